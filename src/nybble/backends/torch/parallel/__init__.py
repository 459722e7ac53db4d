"""Tensor parallelism: a decoder's matrices split over processes, one for each device."""
