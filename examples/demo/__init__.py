"""What `stepcache demo` shows: two small trained networks under k-diffusion, with and without the cache."""
