"""Where other packages imported ``attention.patch_family`` and ``family.Family`` from before.

Both are in :mod:`integration` now; their hooks need not follow at once.
"""

import sys

from .integration import attention, family

# Python asks here once more after importing what stands before the dot.
sys.modules.update({f"{__name__}.attention": attention, f"{__name__}.family": family})
