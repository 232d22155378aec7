"""What several ops share beside their kernels: shapes that they meet, groups of pixels, peers."""
