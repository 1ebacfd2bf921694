"""Codes of organs for DICOM and 3D Slicer: SNOMED CT, with the side as a modifier.

The organ table's own code comes first, then the common ones below; an organ without one gets a
private code, of the scheme `PRIVATE`, whose value is its name.
"""

from typing import NamedTuple

from atlas_store import Organ

SNOMED = "SCT"
"""Designator of SNOMED CT in DICOM."""

PRIVATE = "99KPT"
"""Designator of private codes; those of DICOM begin with 99."""


class Code(NamedTuple):
    """A code of a scheme, and its meaning in words, 64 letters at most."""

    value: str
    scheme: str
    meaning: str


ANATOMY = Code("123037004", SNOMED, "Anatomical Structure")
"""Category of every organ."""

SIDES = {
    "left": Code("7771000", SNOMED, "Left"),
    "right": Code("24028007", SNOMED, "Right"),
}

_LONGEST_CODE = 16
"""Letters of a code's value in DICOM (SH)."""

# Of the names that public label maps use, the part that is left without the side.
_COMMON = {
    "adrenal_gland": ("23451007", "Adrenal gland"),
    "aorta": ("15825003", "Aorta"),
    "atrial_appendage": ("68786006", "Auricular appendage"),
    "autochthon": ("244849004", "Deep muscle of back"),
    "bladder": ("89837001", "Urinary bladder"),
    "brachiocephalic_trunk": ("12691009", "Brachiocephalic artery"),
    "brachiocephalic_vein": ("8887007", "Brachiocephalic vein"),
    "brain": ("12738006", "Brain"),
    "brainstem": ("15926001", "Brainstem"),
    "clavicle": ("51299004", "Clavicle"),
    "clavicula": ("51299004", "Clavicle"),
    "colon": ("71854001", "Colon"),
    "common_carotid_artery": ("32062004", "Common carotid artery"),
    "duodenum": ("38848004", "Duodenum"),
    "esophagus": ("32849002", "Esophagus"),
    "femur": ("71341001", "Femur"),
    "fibula": ("87342007", "Fibula"),
    "gallbladder": ("28231008", "Gallbladder"),
    "gluteus_maximus": ("181674001", "Gluteus maximus muscle"),
    "gluteus_medius": ("78333006", "Gluteus medius muscle"),
    "gluteus_minimus": ("75297007", "Gluteus minimus muscle"),
    "heart": ("80891009", "Heart"),
    "heart_myocardium": ("74281007", "Myocardium"),
    "hip": ("29836001", "Hip"),
    "humerus": ("85050009", "Humerus"),
    "iliac_artery": ("73634005", "Common iliac artery"),
    "iliac_vena": ("46027005", "Common iliac vein"),
    "iliopsoas": ("68455001", "Iliopsoas muscle"),
    "inferior_vena_cava": ("64131007", "Inferior vena cava"),
    "kidney": ("64033007", "Kidney"),
    "larynx": ("4596009", "Larynx"),
    "liver": ("10200004", "Liver"),
    "lung": ("39607008", "Lung"),
    "lung_lower_lobe": ("90572001", "Lower lobe of lung"),
    "lung_middle_lobe": ("72481006", "Middle lobe of right lung"),
    "lung_upper_lobe": ("45653009", "Upper lobe of lung"),
    "mandible": ("91609006", "Mandible"),
    "pancreas": ("15776009", "Pancreas"),
    "parotid": ("45289007", "Parotid gland"),
    "patella": ("64234005", "Patella"),
    "portal_vein_and_splenic_vein": ("110765007", "Portal vein and splenic vein"),
    "prostate": ("41216001", "Prostate"),
    "pulmonary_artery": ("81040000", "Pulmonary artery"),
    "pulmonary_vein": ("122972007", "Pulmonary vein"),
    "radius": ("62413002", "Radius"),
    "rib_1": ("48535007", "First rib"),
    "rib_2": ("78247007", "Second rib"),
    "rib_3": ("25888004", "Third rib"),
    "rib_4": ("25523003", "Fourth rib"),
    "rib_5": ("15339008", "Fifth rib"),
    "rib_6": ("59558009", "Sixth rib"),
    "rib_7": ("24915002", "Seventh rib"),
    "rib_8": ("5953002", "Eighth rib"),
    "rib_9": ("22565002", "Ninth rib"),
    "rib_10": ("77644006", "Tenth rib"),
    "rib_11": ("58830002", "Eleventh rib"),
    "rib_12": ("43993008", "Twelfth rib"),
    "sacrum": ("54735007", "Sacrum"),
    "scapula": ("79601000", "Scapula"),
    "skull": ("89546000", "Skull"),
    "small_bowel": ("30315005", "Small Intestine"),
    "spinal_cord": ("2748008", "Spinal cord"),
    "spleen": ("78961009", "Spleen"),
    "sternum": ("56873002", "Sternum"),
    "stomach": ("69695003", "Stomach"),
    "subclavian_artery": ("36765005", "Subclavian artery"),
    "superior_vena_cava": ("48345005", "Superior vena cava"),
    "thyroid_gland": ("69748006", "Thyroid gland"),
    "tibia": ("12611008", "Tibia"),
    "trachea": ("44567001", "Trachea"),
    "ulna": ("23416004", "Ulna"),
    "urinary_bladder": ("89837001", "Urinary bladder"),
    "vertebrae_c1": ("14806007", "C1 vertebra"),
    "vertebrae_c2": ("39976000", "C2 vertebra"),
    "vertebrae_c3": ("113205007", "C3 vertebra"),
    "vertebrae_c4": ("5329002", "C4 vertebra"),
    "vertebrae_c5": ("36978003", "C5 vertebra"),
    "vertebrae_c6": ("36054005", "C6 vertebra"),
    "vertebrae_c7": ("87391001", "C7 vertebra"),
    "vertebrae_t1": ("64864005", "T1 vertebra"),
    "vertebrae_t2": ("53733008", "T2 vertebra"),
    "vertebrae_t3": ("1626008", "T3 vertebra"),
    "vertebrae_t4": ("73071006", "T4 vertebra"),
    "vertebrae_t5": ("56401006", "T5 vertebra"),
    "vertebrae_t6": ("45296009", "T6 vertebra"),
    "vertebrae_t7": ("62487009", "T7 vertebra"),
    "vertebrae_t8": ("11068009", "T8 vertebra"),
    "vertebrae_t9": ("82687006", "T9 vertebra"),
    "vertebrae_t10": ("7610001", "T10 vertebra"),
    "vertebrae_t11": ("12989004", "T11 vertebra"),
    "vertebrae_t12": ("23215003", "T12 vertebra"),
    "vertebrae_l1": ("66794005", "L1 vertebra"),
    "vertebrae_l2": ("14293000", "L2 vertebra"),
    "vertebrae_l3": ("36470004", "L3 vertebra"),
    "vertebrae_l4": ("11994002", "L4 vertebra"),
    "vertebrae_l5": ("49668003", "L5 vertebra"),
    "vertebrae_s1": ("65985001", "S1 vertebra"),
}

# Chambers of the heart have a side by name, not by place.
_WHOLE = {
    "heart_atrium_left": ("82471001", "Left atrium"),
    "heart_atrium_right": ("73829009", "Right atrium"),
    "heart_ventricle_left": ("87878005", "Left ventricle of heart"),
    "heart_ventricle_right": ("53085002", "Right ventricle of heart"),
}


def codes_of(organ: Organ) -> tuple[Code, Code | None]:
    """Code of an organ, and of its side if its name tells one and its code does not.

    Examples
    --------
    >>> from atlas_store import Organ
    >>> code, side = codes_of(Organ(1, "kidney_left", 50.0, (1, 2, 3)))
    >>> code.value, side.meaning
    ('64033007', 'Left')
    >>> codes_of(Organ(2, "my_nodule", 50.0, (1, 2, 3)))
    (Code(value='my_nodule', scheme='99KPT', meaning='my nodule'), None)
    """
    words = [word.lower() for word in organ.name.split("_") if word]
    side = next((word for word in words if word in SIDES), None)
    rest = "_".join(word for word in words if word not in SIDES)
    known = organ.snomed or _WHOLE.get("_".join(words)) or _COMMON.get(rest)
    if known is not None:
        code = Code(known[0], SNOMED, known[1])
    else:
        code = Code(organ.name[:_LONGEST_CODE], PRIVATE, organ.name.replace("_", " "))
    told = side is None or side in code.meaning.lower().split()
    return code, None if told or side is None else SIDES[side]
