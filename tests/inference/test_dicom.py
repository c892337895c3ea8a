"""DICOM series that the tests write: read on their grid, segmented, written, and read back."""

import hashlib
import json
import sys

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from tumorjax.anatomy import LABELS
from tumorjax.errors import CaseError, UserError
from tumorjax.files import read_csv
from tumorjax.inference import dicom, dicom_segmentation, ensemble, predict
from tumorjax.inference.dicom_segmentation import Segment, coding

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_series(
    folder, volume, spacing=(2.0, 2.0, 2.0), first=(-30.0, -40.0, 100.0), step=None,
    directions=AXIAL, series=1, intercept=-1024, **changes,
):  # fmt: skip
    """Writes [column, row, slice] in HU as a CT series, in an order of names unlike the stack's.

    Args:
        spacing: of columns, rows and slices, mm.
        first: position of the first slice's first pixel, LPS.
        step: from slice to slice; None for the normal of the rows and columns.
        directions: ImageOrientationPatient.
        series: number of the series in its study.
        changes: other attributes, or functions of the slice's index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    across, down = np.reshape(directions, (2, 3))
    step = np.cross(across, down) * spacing[2] if step is None else np.asarray(step)
    uid = f"1.2.826.0.1.3680043.8.498.{series}"
    files = []
    for index in range(volume.shape[2]):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{uid}.{index + 1}"
        data.SeriesInstanceUID, data.StudyInstanceUID = uid, "1.2.826.0.1.3680043.8.498.77"
        data.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.78"
        data.PatientName, data.PatientID = "DOE^JANE", "SECRET-ID"
        data.PatientBirthDate, data.PatientSex, data.StudyDescription = "19010203", "F", "SECRET"
        data.StudyDate, data.StudyTime, data.StudyID = "20010203", "101112", "9"
        data.AccessionNumber = data.ReferringPhysicianName = ""
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", series, index + 1
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.ImagePositionPatient = [round(float(v), 6) for v in first + index * step]
        data.ImageOrientationPatient = [float(value) for value in directions]
        data.PixelSpacing = [spacing[1], spacing[0]]
        data.SliceThickness = spacing[2]
        data.Rows, data.Columns = volume.shape[1], volume.shape[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, intercept, "HU"
        data.PixelData = (volume[:, :, index].T - intercept).astype(np.int16).tobytes()
        for name, value in changes.items():
            value = value(index) if callable(value) else value
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)
        # Names in an order of their own.
        name = hashlib.sha256(f"{series} {index}".encode()).hexdigest()[:10]
        path = folder / f"{name}.dcm"
        data.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


@pytest.fixture
def noise(rng):
    return rng.integers(-1000, 1500, (9, 7, 6)).astype(np.int16)


# ---------------------------------------------------------------------------- reading


def test_a_series_is_read_on_its_grid_as_simpleitk_sees_it(noise, tmp_path):
    turn = nib.eulerangles.euler2mat(0.2, 0.1, -0.3)
    directions = (*turn[:, 0], *turn[:, 1])
    write_series(tmp_path, noise, (0.8, 0.7, 2.5), (-120.5, 33.25, 700.0), directions=directions)
    ((name, folder, files),), rows = dicom.find_series(tmp_path)
    assert (name, folder, rows) == (tmp_path.name, tmp_path, [])
    scan = dicom.read_series("a", files)
    assert scan.image.dtype == np.int16
    np.testing.assert_array_equal(scan.image, noise)

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    theirs = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0), noise)
    for index in ((0, 0, 0), (8, 0, 0), (0, 6, 0), (3, 2, 5)):
        point = nib.affines.apply_affine(scan.affine, index) * (-1, -1, 1)
        expected = theirs.TransformContinuousIndexToPhysicalPoint([float(i) for i in index])
        np.testing.assert_allclose(point, expected, atol=1e-3)
    np.testing.assert_allclose(scan.header.get_best_affine(), scan.affine, atol=1e-4)


def test_tilted_gantries_shear_the_affine_and_rounded_positions_are_even(noise, tmp_path):
    files = write_series(tmp_path / "tilted", noise, (1, 1, 3), step=(0, 0.8, 3.0))
    scan = dicom.read_series("a", files)
    np.testing.assert_allclose(scan.affine[:3, 2], (0, -0.8, 3.0), atol=1e-6)
    np.testing.assert_array_equal(scan.image, noise)
    # 0.625 mm apart, written as 0, 0.6, 1.3, 1.9, 2.5, 3.1.
    rounded = write_series(
        tmp_path / "rounded", noise, (1, 1, 0.625),
        ImagePositionPatient=lambda i: [0, 0, round(0.625 * i + 1e-9, 1)],
    )  # fmt: skip
    assert dicom.read_series("a", rounded).affine[2, 2] == pytest.approx(3.1 / 5)


def test_each_slices_own_slope_is_applied(noise, tmp_path):
    files = write_series(tmp_path, noise // 2 * 2, intercept=0)
    for number, path in enumerate(files):
        data = pydicom.dcmread(path)
        if number % 2:
            values = np.frombuffer(data.PixelData, np.int16) // 2
            data.PixelData, data.RescaleSlope = values.astype(np.int16).tobytes(), 2
            data.save_as(path)
    np.testing.assert_array_equal(dicom.read_series("a", files).image, noise // 2 * 2)


@pytest.mark.parametrize(
    "syntax", ["RLELossless", "JPEGLSLossless", "DeflatedExplicitVRLittleEndian"]
)
def test_compressed_series_are_read(rng, tmp_path, syntax):
    noise = rng.integers(-1000, 1500, (16, 12, 3)).astype(np.int16)
    files = write_series(tmp_path, noise)
    for path in files:
        data = pydicom.dcmread(path)
        if syntax.startswith("Deflated"):
            data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        else:
            data.compress(getattr(pydicom.uid, syntax))
        data.save_as(path)
    np.testing.assert_array_equal(dicom.read_series("a", files).image, noise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ImagePositionPatient": lambda i: [0, 0, 2.0 * (i + 2 * (i > 2))]},
         r"2 missing slices between 4\.00 and 10\.00 mm of its axis \(a gap of 6\.00 mm, where"
         r" others are 2\.00 mm apart\)"),
        ({"ImagePositionPatient": lambda i: [0, 0, 2.0 * (i + (i > 4))]},
         r"1 missing slice between 8\.00 and 12\.00 mm"),
        ({"ImagePositionPatient": lambda i: [0, 0, 2.0 * i + 0.9 * (i == 3)]},
         r"uneven spacing: 2\.90 mm between 4\.00 and 6\.90 mm"),
        ({"ImagePositionPatient": lambda i: [0, 0, 2.0 * (i - (i == 4))]},
         r"two slices at 6\.00 mm"),
        ({"ImagePositionPatient": lambda i: [5.0 * (i == 3), 0, 2.0 * i]}, "beside the line"),
        ({"ImageOrientationPatient": lambda i: [1, 0, 0, 0, (1, 0.8)[i == 1], (0, 0.6)[i == 1]]},
         "differ in ImageOrientationPatient"),
        ({"PixelSpacing": lambda i: [2, 2.5] if i == 1 else [2, 2]}, "differ in PixelSpacing"),
        ({"ImagePositionPatient": lambda i: None if i == 2 else [0, 0, 2.0 * i]},
         "a slice without ImagePositionPatient"),
        ({"NumberOfFrames": 40}, r"multi-frame DICOM \(40 slices in one file\)"),
        ({"SamplesPerPixel": 3}, "slices in colour"),
        ({"Modality": "MR"}, "a slice of MR, expected CT"),
    ],
)  # fmt: skip
def test_what_is_no_even_stack_of_ct_is_refused_by_name(noise, tmp_path, changes, message):
    files = write_series(tmp_path, noise, **changes)
    with pytest.raises(CaseError, match=message) as error:
        dicom.read_series("case_7", files)
    assert "case_7" in str(error.value)
    for secret in ("DOE", "SECRET"):
        assert secret not in str(error.value)


def test_truncated_slices_and_single_ones_are_refused(noise, tmp_path):
    files = write_series(tmp_path, noise)
    with pytest.raises(CaseError, match="one slice, expected a stack"):
        dicom.read_series("a", files[:1])
    whole = files[3].read_bytes()
    files[3].write_bytes(whole[:-30])
    with pytest.raises(CaseError, match="not readable to their end"):
        dicom.read_series("a", files)
    files[3].write_bytes(whole[:200])
    with pytest.raises(CaseError):
        dicom.read_series("a", files)


def test_series_are_found_by_their_uid_wherever_their_files_lie(noise, tmp_path):
    mixed = tmp_path / "mixed"
    first = write_series(mixed, noise, series=1)
    second = write_series(mixed, noise, series=2)
    deep = write_series(tmp_path / "patient" / "study" / "ct", noise, series=3)
    write_series(tmp_path / "reports", noise[..., :1], series=4, Modality="SR")
    write_series(
        tmp_path / "scout", noise[..., :1], series=5, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    write_series(tmp_path / "mr", noise, series=6, Modality="MR")
    spread = write_series(tmp_path / "spread" / "a", noise, series=7)
    (tmp_path / "spread" / "b").mkdir()
    spread[0] = spread[0].rename(tmp_path / "spread" / "b" / "x")
    (tmp_path / "notes.txt").write_text("DICM")
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00")
    found, rows = dicom.find_series(tmp_path)
    by_name = {name: set(files) for name, _, files in found}
    uids = [f"1.2.826.0.1.3680043.8.498.{number}" for number in (1, 2)]
    hashes = [hashlib.sha256(uid.encode()).hexdigest()[:8] for uid in uids]
    assert by_name == {
        f"mixed_{hashes[0]}": set(first),
        f"mixed_{hashes[1]}": set(second),
        "patient_study_ct": set(deep),
        "spread": set(spread),
    }
    assert {row["case"]: row["stage"] for row in rows} == {"mr": "find", "broken": "find"}
    assert any("a series of MR, expected CT" in row["reason"] for row in rows)


# ---------------------------------------------------------------------------- the job


def anatomy(phantom, shape=(40, 32, 30)):
    """The phantom as [column, row, slice] of axial slices: columns to the patient's left."""
    image, labels = phantom(shape, (2, 2, 2))
    return image[::-1, ::-1], labels[::-1, ::-1]


def test_a_series_goes_in_and_a_segmentation_of_it_comes_out(
    network, tmp_path, config_for, phantom, caplog
):
    image, labels = anatomy(phantom)
    files = write_series(tmp_path / "in" / "case_1", image)
    config = config_for(tmp_path / "in", tmp_path / "out", "dicom", statistics=True)
    assert predict.run(config, tmp_path / "work") == 0
    folder = tmp_path / "out" / "case_1"
    assert {path.name for path in folder.iterdir()} == {"segmentation.dcm", "statistics.json"}

    seg = hd.seg.segread(folder / "segmentation.dcm")
    assert seg.SegmentationType == "BINARY"
    names = {"kidney_left": "Left", "kidney_right": "Right", "liver": "", "tumor": ""}
    found = {seg.get_segment_description(n).segment_label: n for n in seg.segment_numbers}
    assert list(found) == list(names)
    volume = seg.get_volume(combine_segments=False)
    for name, number in found.items():
        value = LABELS["liver_lesion" if name == "tumor" else name]
        index = list(seg.segment_numbers).index(number)
        # Every voxel of the segment, at its place in the patient.
        inside = np.argwhere(volume.array[..., index] > 0)
        places = nib.affines.apply_affine(volume.affine, inside)
        expected = np.argwhere(labels == value) * 2.0 + (-30.0, -40.0, 100.0)
        assert len(inside) == len(expected) > 50
        np.testing.assert_allclose(
            places[np.lexsort(places.T)], expected[np.lexsort(expected.T)], atol=1e-3
        )
        described = seg.get_segment_description(number)
        kind = described.SegmentedPropertyTypeCodeSequence[0]
        side = kind.get("SegmentedPropertyTypeModifierCodeSequence", [])
        assert (side[0].CodeMeaning if side else "") == names[name]
        assert kind.CodingSchemeDesignator == "SCT"
    tumour = seg.get_segment_description(found["tumor"])
    regions = [item.CodeMeaning for item in tumour.AnatomicRegionSequence]
    assert regions == ["Liver", "Kidney"]
    assert tumour.segmented_property_category.value == "49755003"
    # It belongs to the study and patient of its source, slice by slice.
    assert seg.PatientID == "SECRET-ID"
    assert seg.StudyInstanceUID == "1.2.826.0.1.3680043.8.498.77"
    assert seg.FrameOfReferenceUID == "1.2.826.0.1.3680043.8.498.78"
    referenced = {str(uids[2]) for uids in seg.get_source_image_uids()}
    own = {str(pydicom.dcmread(path).SOPInstanceUID) for path in files}
    assert referenced <= own
    assert len(referenced) >= 18

    # The patient is in no other file and in no message.
    text = caplog.text
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "work").rglob("*")]:
        if path.is_file() and path.suffix != ".dcm":
            text += path.read_bytes().decode("latin-1")
    for secret in ("DOE", "JANE", "SECRET", "19010203"):
        assert secret not in text
    # Centres are DICOM's coordinates.
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["world"] == "LPS, mm"
    centre = np.argwhere(labels == LABELS["liver"]).mean(axis=0) * 2 + (-30, -40, 100)
    np.testing.assert_allclose(statistics["structures"]["liver"]["centre_mm"], centre, atol=1e-3)

    # The same again makes an object of the same UIDs: no second one in an archive.
    uids = seg.SeriesInstanceUID, seg.SOPInstanceUID
    (folder / "segmentation.dcm").unlink()
    assert predict.run(config, tmp_path / "work") == 0
    again = pydicom.dcmread(folder / "segmentation.dcm")
    assert (again.SeriesInstanceUID, again.SOPInstanceUID) == uids


def test_series_become_nifti_masks_without_the_patient_and_bad_ones_are_listed(
    network, tmp_path, config_for, phantom
):
    image, labels = anatomy(phantom)
    write_series(tmp_path / "in" / "good", image, series=1)
    files = write_series(tmp_path / "in" / "gap", image, series=2)
    files[4].unlink()
    whole = write_series(tmp_path / "in" / "cut", image, series=3)[2]
    whole.write_bytes(whole.read_bytes()[:-100])
    write_series(tmp_path / "in" / "mr", image, series=4, Modality="MR")
    config = config_for(tmp_path / "in", tmp_path / "out", preview=True, statistics=True)
    assert predict.run(config, tmp_path / "work") == 1
    mask = nib.load(tmp_path / "out" / "good.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), labels)
    expected = [[-2, 0, 0, 30], [0, -2, 0, 40], [0, 0, 2, 100], [0, 0, 0, 1]]
    np.testing.assert_allclose(mask.affine, expected)
    assert mask.header["sform_code"] == 1
    assert mask.header["qform_code"] == 1
    rows = {row["case"]: row["reason"] for row in read_csv(tmp_path / "work" / "rejected.csv")}
    assert set(rows) == {"gap", "cut", "mr"}
    assert "1 missing slice between 106.00 and 110.00 mm" in rows["gap"]
    assert "not readable to their end" in rows["cut"]
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "work").rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            data += nib.load(path).header.binaryblock if path.suffix == ".gz" else b""
            assert b"DOE" not in data
            assert b"SECRET" not in data


def test_a_segmentation_without_any_voxel_is_written(
    network, tmp_path, config_for, phantom, monkeypatch
):
    image, _ = anatomy(phantom)
    write_series(tmp_path / "in" / "a", image)
    monkeypatch.setattr(ensemble, "labels", lambda answered: np.zeros(image.shape, np.uint8))
    config = config_for(tmp_path / "in", tmp_path / "out", "dicom")
    assert predict.run(config, tmp_path / "work") == 0
    seg = hd.seg.segread(tmp_path / "out" / "a" / "segmentation.dcm")
    assert not seg.pixel_array.any()
    assert len(seg.segment_numbers) == 4


def test_single_slices_are_no_input(network, tmp_path, config_for, noise):
    files = write_series(tmp_path / "in", noise)
    with pytest.raises(UserError, match=r"one DICOM file\. Give the folder"):
        predict.run(config_for(files[0], tmp_path / "out"), tmp_path / "work")


def test_without_the_extra_it_is_named(monkeypatch, noise, tmp_path):
    write_series(tmp_path, noise)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom._pydicom.cache_clear()
    with pytest.raises(UserError, match=r'pip install "tumorjax\[dicom\]"'):
        dicom.find_series(tmp_path)


# ---------------------------------------------------------------------------- codes


@pytest.mark.parametrize("name", LABELS)
def test_every_structure_has_codes_of_snomed(name):
    codes = coding(Segment(name, LABELS[name], (name,)))
    for part in (codes.category, codes.kind, *codes.regions, *filter(None, [codes.side])):
        code = dicom_segmentation._code(part)
        assert code.scheme_designator == "SCT"
        assert code.value.isdigit()
    side = name.rsplit("_", 1)[-1]
    assert codes.side == (side.capitalize() if side in ("left", "right") else "")


def test_codes_say_which_organ_a_lesion_is_in_and_unknown_names_are_refused():
    lesion = coding(Segment("x", 1, ("pancreatic_lesion",)))
    assert lesion == ("MorphologicallyAbnormalStructure", "Lesion", ("Pancreas",), "")
    assert coding(Segment("kidney", 1, ("kidney_left", "kidney_right"))).kind == "Kidney"
    both = coding(Segment("x", 1, ("liver", "spleen")))
    assert both == ("AnatomicalStructure", "Organ", ("Liver", "Spleen"), "")
    with pytest.raises(UserError, match=r"'cancer' is none of anatomy.py's structures"):
        coding(Segment("cancer", 2, ()))
