"""Who teaches, and on which tokens: teacher weights, the trust region, and aligned responses."""
