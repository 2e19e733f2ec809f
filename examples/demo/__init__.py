"""What `stepcache demo` shows: three small trained networks under k-diffusion, with and without the cache."""
