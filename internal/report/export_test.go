package report

// NewSerialOn is [NewSerial] with a device of the test's own.
func NewSerialOn(open func() (device, error)) *Serial {
	s := NewSerial("a test's")
	s.open = func(string) (device, error) { return open() }
	return s
}

// Device is what open returns.
type Device = device
