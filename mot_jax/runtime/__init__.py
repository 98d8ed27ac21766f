"""The process and its machine: paths, processes, compilation cache, memory allocator."""
