# test_sspformer_mri.py is the Model Zoo's: it runs beside models/sspformer_mri, as tests/test_package.py does it
collect_ignore = ["test_sspformer_mri.py"]
