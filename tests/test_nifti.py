"""What cannot be a CT is refused by name and reason; masks come out on the scan's exact grid."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from tumorjax.errors import CaseError
from tumorjax.nifti import read_ct, write_mask

AFFINE = np.array([[-0.8, 0, 0, 90.0], [0, -0.8, 0, 80.0], [0, 0, 2.5, -70.0], [0, 0, 0, 1]])


def save(path, array, affine=AFFINE, **fields):
    image = nib.Nifti1Image(array, affine)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


@pytest.fixture
def ct(rng):
    return rng.integers(-1000, 1500, (7, 6, 5)).astype(np.int16)


def test_whole_numbers_stay_whole_and_scaled_ones_are_scaled(ct, tmp_path):
    scan = read_ct(save(tmp_path / "a.nii.gz", ct))
    assert scan.image.dtype == np.int16
    np.testing.assert_array_equal(scan.image, ct)
    np.testing.assert_allclose(scan.affine, AFFINE, rtol=1e-6)

    image = nib.Nifti1Image((ct + 1024).astype(np.int16), AFFINE)
    image.header.set_slope_inter(1, -1024)
    # Written by hand: nibabel chooses a slope of its own when it saves.
    data = bytearray(image.to_bytes())
    data[112:120] = np.array([1, -1024], np.float32).tobytes()
    data[352:] = (ct + 1024).astype(np.int16).tobytes(order="F")
    (tmp_path / "b.nii").write_bytes(data)
    scan = read_ct(tmp_path / "b.nii")
    assert scan.image.dtype == np.float32
    np.testing.assert_array_equal(scan.image, ct)


def bad_files(folder, ct):
    """File -> what its error has to say."""
    whole = save(folder / "whole.nii.gz", ct).read_bytes()
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    plain = gzip.decompress(whole)
    (folder / "short.nii").write_bytes(plain[:-20])
    (folder / "text.nii.gz").write_bytes(b"patient name")
    save(folder / "series.nii.gz", np.stack([ct, ct], axis=-1))
    save(folder / "slice.nii.gz", ct[..., 0])
    rgb = np.zeros(ct.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(folder / "colour.nii.gz", rgb)
    save(folder / "complex.nii.gz", ct.astype(np.complex64))
    holes = ct.astype(np.float32)
    holes[1, 2, 3] = np.nan
    holes[0, 0, 0] = np.inf
    save(folder / "holes.nii.gz", holes)
    save(folder / "scaled.nii.gz", np.clip(ct / 1500, 0, 1).astype(np.float32))
    save(folder / "metres.nii.gz", ct, np.diag([0.0008, 0.0008, 0.0025, 1]))
    flat = AFFINE.copy()
    flat[:, 1] = flat[:, 0]
    singular = nib.Nifti1Image(ct, AFFINE)
    singular.header["srow_x"], singular.header["srow_y"] = flat[0], flat[1]
    singular.header["srow_z"] = flat[2]
    singular.header["sform_code"] = 1
    data = bytearray(singular.to_bytes())
    data[280:328] = flat[:3].astype(np.float32).tobytes()
    (folder / "singular.nii").write_bytes(data)
    for name, size in (("zero", 0.0), ("negative", -0.8), ("nan", np.nan)):
        data = bytearray(plain)
        data[80:84] = np.float32(size).tobytes()
        (folder / f"{name}.nii").write_bytes(data)
    return {
        "empty.nii.gz": "the file is empty",
        "truncated.nii.gz": "not readable to its end",
        "short.nii": "not readable to its end",
        "text.nii.gz": "not readable to its end",
        "missing.nii.gz": "not readable to its end as NIfTI \\(FileNotFoundError\\)",
        "series.nii.gz": "4D \\(7 x 6 x 5 x 2\\), expected a 3D scan",
        "slice.nii.gz": "2D",
        "colour.nii.gz": "an RGB image",
        "complex.nii.gz": "complex64 values",
        "holes.nii.gz": "2 voxels are NaN or infinite",
        "scaled.nii.gz": "no CT in HU",
        "metres.nii.gz": "spacing 0.0008 x 0.0008 x 0.0025 mm",
        "singular.nii": "singular",
        "zero.nii": "voxel size 0 x 0.8 x 2.5 mm",
        "negative.nii": "voxel size -0.8 x 0.8 x 2.5 mm",
        "nan.nii": "voxel size nan x 0.8 x 2.5 mm",
    }


def test_every_bad_file_has_its_own_message(ct, tmp_path):
    for name, expected in bad_files(tmp_path, ct).items():
        with pytest.raises(CaseError, match=expected) as error:
            read_ct(tmp_path / name)
        assert error.value.case == str(tmp_path / name)
        assert "patient name" not in str(error.value)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_masks_have_the_scans_grid_to_the_bit_and_no_text(ct, rng, tmp_path, kind):
    turn = np.deg2rad(7)
    oblique = AFFINE.copy()
    oblique[:2, :2] = [[-0.8 * np.cos(turn), -0.8 * np.sin(turn)],
                       [0.8 * np.sin(turn), -0.8 * np.cos(turn)]]  # fmt: skip
    image = kind(ct, oblique)
    image.set_qform(oblique, code=1)
    image.set_sform(oblique, code=3)
    image.header.set_xyzt_units("mm", "sec")
    for field in ("descrip", "intent_name", "aux_file"):
        image.header[field] = b"DOE^JANE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    nib.save(image, tmp_path / "ct.nii.gz")
    scan = read_ct(tmp_path / "ct.nii.gz")

    mask = rng.integers(0, 33, ct.shape).astype(np.uint8)
    write_mask(tmp_path / "mask.nii.gz", mask, scan.header)
    assert b"DOE" not in gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    written = nib.load(tmp_path / "mask.nii.gz")
    assert type(written) is kind
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), mask)
    assert written.get_data_dtype() == np.uint8
    original = nib.load(tmp_path / "ct.nii.gz").header
    for field in ("srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "quatern_b",
                  "quatern_c", "quatern_d", "qoffset_x", "pixdim", "xyzt_units"):  # fmt: skip
        np.testing.assert_array_equal(written.header[field], original[field])
    np.testing.assert_array_equal(written.affine, scan.affine)

    first = (tmp_path / "mask.nii.gz").read_bytes()
    write_mask(tmp_path / "mask.nii.gz", mask, scan.header)
    assert (tmp_path / "mask.nii.gz").read_bytes() == first
    assert [path.name for path in tmp_path.glob("*part*")] == []


def test_real_scans_are_read(real_data):
    scan = read_ct(real_data / "lung" / "lung1_ct.nii.gz")
    assert scan.image.shape == (512, 512, 48)
    assert scan.image.dtype.kind == "i"
    for name in ("example_ct", "example_ct_sm"):
        assert read_ct(real_data / "totalsegmentator" / f"{name}.nii.gz").image.min() < -1000
