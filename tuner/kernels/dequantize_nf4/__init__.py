"""4-bit weights -> the matrices that matmul."""
