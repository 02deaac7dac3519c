"""Weight formats: each is a file with one `Format`, listed in ALL. Every table of formats is made from FORMATS."""

from collections.abc import Mapping

from lockstep.formats.bf16 import BF16
from lockstep.formats.f16 import F16
from lockstep.formats.f32 import F32
from lockstep.formats.format import Format
from lockstep.formats.fp4.nvfp4 import NVFP4
from lockstep.formats.fp4.nvfp4_scaled import NVFP4_SCALED
from lockstep.formats.groups.channel8 import CHANNEL8
from lockstep.formats.groups.group4 import GROUP4
from lockstep.formats.groups.group8 import GROUP8
from lockstep.formats.iq4_nl import IQ4_NL
from lockstep.formats.iq4_xs import IQ4_XS
from lockstep.formats.mxfp4 import MXFP4
from lockstep.formats.q2_k import Q2_K
from lockstep.formats.q3_k import Q3_K
from lockstep.formats.q4_0 import Q4_0
from lockstep.formats.q4_1 import Q4_1
from lockstep.formats.q4_k import Q4_K
from lockstep.formats.q5_0 import Q5_0
from lockstep.formats.q5_1 import Q5_1
from lockstep.formats.q5_k import Q5_K
from lockstep.formats.q6_k import Q6_K
from lockstep.formats.q8_0 import Q8_0

GGUF = (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4)
ALL = (*GGUF, GROUP4, GROUP8, CHANNEL8, NVFP4_SCALED)
FORMATS: Mapping[str, Format] = {format.name: format for format in ALL}
BLOCK_FORMATS: Mapping[str, Format] = {name: format for name, format in FORMATS.items() if format.is_quantized}
