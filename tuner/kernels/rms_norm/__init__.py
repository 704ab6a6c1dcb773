"""RMSNorm, alone and together with the sum of the residual stream that it reads."""
