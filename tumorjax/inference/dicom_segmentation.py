"""Label maps as DICOM Segmentation objects (with highdicom, the extra "dicom").

A segmentation names its source series and repeats its patient and study modules, as the standard
demands (PS3.3 A.51); highdicom copies them from the source's headers into the file, and nowhere
else. Structures are coded in SNOMED CT by the names of anatomy.py (PS3.16 CID 7150 and following).
"""

import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tumorjax.anatomy import HOST, PAIRS, TUMORS, organ_labels
from tumorjax.errors import UserError
from tumorjax.inference.dicom import headers, required
from tumorjax.nifti import Scan

# Names of pydicom's dictionary of SNOMED CT; a structure with two is where both are.
_CODES: dict[str, tuple[str, ...]] = {
    "aorta": ("Aorta",),
    "gall_bladder": ("Gallbladder",),
    "kidney_left": ("Kidney",),
    "kidney_right": ("Kidney",),
    "liver": ("Liver",),
    "pancreas": ("Pancreas",),
    "postcava": ("InferiorVenaCava",),
    "spleen": ("Spleen",),
    "stomach": ("Stomach",),
    "adrenal_gland_left": ("AdrenalGland",),
    "adrenal_gland_right": ("AdrenalGland",),
    "bladder": ("Bladder",),
    "celiac_trunk": ("CeliacAxis",),
    "colon": ("Colon",),
    "duodenum": ("Duodenum",),
    "esophagus": ("Esophagus",),
    "femur_left": ("Femur",),
    "femur_right": ("Femur",),
    "hepatic_vessel": ("HepaticVein", "PortalVein"),
    "intestine": ("SmallIntestine",),
    "lung_left": ("Lung",),
    "lung_right": ("Lung",),
    "portal_vein_and_splenic_vein": ("PortalVein", "SplenicVein"),
    "prostate": ("Prostate",),
    "rectum": ("Rectum",),
    "uterus": ("Uterus",),
}
_VESSELS = ("hepatic_vessel", "portal_vein_and_splenic_vein")
# A lesion may also be a cyst.
_LESIONS = tuple(name for name in TUMORS if name.endswith("_lesion"))


class Segment(NamedTuple):
    """One structure of a segmentation object.

    Attributes:
        name: shown to the reader.
        value: in the label map.
        labels: of anatomy.py that it is or unites.
    """

    name: str
    value: int
    labels: tuple[str, ...]


class Coding(NamedTuple):
    """SNOMED CT codes of a segment, as names of pydicom's dictionary.

    Attributes:
        category: what kind of structure.
        kind: the structure itself.
        regions: where in the body, for what is no organ of its own.
        side: "Left", "Right" or "".
    """

    category: str
    kind: str
    regions: tuple[str, ...]
    side: str


def coding(segment: Segment) -> Coding:
    """Returns the codes of a segment.

    Raises:
        UserError: it is none of anatomy.py's structures.
    """
    if not segment.labels:
        raise UserError(
            f"{segment.name!r} is none of anatomy.py's structures, so it has no code for DICOM. Say"
            f" which it is: --config.names=\"{{'{segment.name}': 'liver_lesion'}}\""
        )
    if set(segment.labels) <= set(TUMORS):
        hosts = [HOST[label] for label in segment.labels]
        regions = dict.fromkeys(_CODES[organ_labels(host)[0]][0] for host in hosts)
        kind = "Lesion" if set(segment.labels) & set(_LESIONS) else "Neoplasm"
        return Coding("MorphologicallyAbnormalStructure", kind, tuple(regions), "")
    codes = dict.fromkeys(
        code
        for label in segment.labels
        for code in _CODES[label if label in _CODES else organ_labels(HOST[label])[0]]
    )
    if len(codes) > 1:
        kind = "BloodVessel" if set(segment.labels) <= set(_VESSELS) else "Organ"
        return Coding("AnatomicalStructure", kind, tuple(codes), "")
    side = ""
    for pair in PAIRS:
        if len(segment.labels) == 1 and segment.labels[0] in pair:
            side = ("Left", "Right")[pair.index(segment.labels[0])]
    return Coding("AnatomicalStructure", next(iter(codes)), (), side)


def encode(
    labels: UInt8[np.ndarray, "columns rows slices"],
    scan: Scan,
    segments: Sequence[Segment],
    record: str,
) -> bytes:
    """Returns a label map as the file of a DICOM Segmentation object (binary, a segment a bit).

    Args:
        labels: on the grid of the scan.
        scan: of a DICOM series; its files are read again for what the object has to repeat.
        segments: values of the label map; one that does not occur is described all the same.
        record: all that the labels depend on beside the scan: the same gives the same UIDs.

    Raises:
        CaseError: a file of the series is not readable any more.
        UserError: a segment has no code.
    """
    hd = required("highdicom")
    generate_uid = required("pydicom.uid").generate_uid
    sources = headers(scan.slices)
    software = version("tumorjax")
    algorithm = hd.AlgorithmIdentificationSequence(
        name="tumorjax", version=software, family=_code("ArtificialIntelligence", "DCM")
    )
    described = [
        _described(hd, number, segment, algorithm) for number, segment in enumerate(segments, 1)
    ]
    numbers = np.zeros(256, np.uint8)
    for number, segment in enumerate(segments, 1):
        numbers[segment.value] = number
    origin = [str(sources[0].SeriesInstanceUID), record]
    result = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers[labels.transpose(2, 1, 0)],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=generate_uid(entropy_srcs=[*origin, "series"]),
        series_number=_series_number(sources[0]),
        sop_instance_uid=generate_uid(entropy_srcs=[*origin, "instance"]),
        instance_number=1,
        manufacturer="tumorjax",
        manufacturer_model_name="tumorjax",
        software_versions=software,
        device_serial_number="none",
        content_label="SEGMENTATION",
        omit_empty_frames=bool(labels.any()),
    )
    result.SeriesDescription = "Segmentation by tumorjax"
    buffer = io.BytesIO()
    result.save_as(buffer)
    return buffer.getvalue()


def segments_of(
    structures: Sequence[tuple[str, int]], labels: Mapping[str, Sequence[str]]
) -> list[Segment]:
    """Returns the segments of a label map, and checks that each has a code.

    Args:
        structures: names and values.
        labels: of anatomy.py that each unites.

    Raises:
        UserError: one has none.
    """
    segments = [Segment(name, value, tuple(labels[name])) for name, value in structures]
    for segment in segments:
        coding(segment)
    return segments


def _described(hd: Any, number: int, segment: Segment, algorithm: Any) -> Any:
    codes = coding(segment)
    result = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:64],
        segmented_property_category=_code(codes.category),
        segmented_property_type=_code(codes.kind),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        anatomic_regions=[_code(region) for region in codes.regions] or None,
    )
    if codes.side:
        kind = result.SegmentedPropertyTypeCodeSequence[0]
        side = hd.sr.CodedConcept.from_code(_code(codes.side))
        kind.SegmentedPropertyTypeModifierCodeSequence = [side]
    return result


def _code(name: str, scheme: str = "SCT") -> Any:
    return getattr(getattr(required("pydicom.sr.codedict").codes, scheme), name)


def _series_number(source: Any) -> int:
    """Returns a number apart from those of the study's scans, which few scanners count to 1000."""
    try:
        return 1000 + int(source.get("SeriesNumber") or 0)
    except ValueError:
        return 1000
