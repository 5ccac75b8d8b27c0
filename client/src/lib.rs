//! Run a mixture-of-experts model that is too big for the device, on the device.
