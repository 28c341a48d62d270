"""The cost of steps and recoveries: roofline, throughput, calibration, buckets, and the design of a mesh."""
