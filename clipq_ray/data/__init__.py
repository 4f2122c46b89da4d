"""Images and labels by name or URI, as batches that are a function of the generator given.

`open_data` and `from_loaders` make a `Data`; its `Split`s give batches; `batches` prepares them in a background thread; `resident.placed`
puts decoded images onto a GPU. Not covered: which images go to which step or rank (the training loop decides).
"""

from clipq_ray.data.loaders import from_loaders
from clipq_ray.data.opening import open_data, open_test
from clipq_ray.data.prefetch import batches
from clipq_ray.data.preprocessing import Preprocessing
from clipq_ray.data.split import Data, Split

__all__ = ["Data", "Preprocessing", "Split", "batches", "from_loaders", "open_data", "open_test"]
