"""What mining costs beside the forward passes that it needs, as a function of the number of images.

``python benchmarks/bench_mining.py`` (about two minutes on one core; ``--seconds`` for more). Full-size ZFNet, its five
convolutions, batches of 32 of natural-looking noise; all calls are timed alternately in one process:

* *forward*: the same executor on the same batch, without mining;
* *mining*: forward pass, maxima, comparison, lists and windows, with lists that have seen N images already;
* *rival*: forward pass, then ``amax``/``argmax`` of every map by torch, and ``topk`` of the lists with the batch.

Lists are brought to the state after N images by scaling: what is measured is a batch whose number of entries is that
of a batch after N images, ``batch · top / N`` a map. The cost of a batch is ``fixed + entry · entries``; both are fitted
to the measured batches, and the overhead of a whole run of N images follows from the expected number of entries,
``top · (1 + ln(N / top))`` a map.
"""
