"""Trains students from a cache under DeepSpeed ZeRO, without the teacher."""
