"""Host adapters, one module a host. Importing this package imports no host."""
