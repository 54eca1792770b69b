package supervisor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// region is the shared memory of a chain of epochs: source/server/hot_restart_impl.h of Envoy, of
// hot restart version 11 (1.9 to 1.40 at least):
//
//	uint64 size; uint64 version; pthread_mutex_t log, access log; atomic uint64 flags
//
// Flag 1 is "an epoch initializes". Each epoch sets it at its start and takes it back when it is
// live and the one before has been told to drain. One that ends before that leaves it, and then no
// other one starts: "previous envoy process is still initializing", for ever. So whoever looks
// after the processes must take it back. See docs/design/facts.md#envoy-hot-restart-mark.
type region string

const (
	regionVersion = 11
	initializing  = 1
)

// regionOf is the region of a base id, which Envoy multiplies by ten.
func regionOf(base uint32) region {
	return region(fmt.Sprintf("/dev/shm/envoy_shared_memory_%d", 10*uint64(base)))
}

// errRegion says that a region is none that is known here.
var errRegion = errors.New("unknown form of Envoy's shared memory")

func (r region) open(flag int) (f *os.File, size int64, err error) {
	f, err = os.OpenFile(string(r), flag, 0)
	if err != nil {
		return nil, 0, err
	}
	var head [16]byte
	if _, err = io.ReadFull(f, head[:]); err == nil {
		size = int64(binary.NativeEndian.Uint64(head[:]))
		info, statErr := f.Stat()
		if v := binary.NativeEndian.Uint64(head[8:]); statErr != nil || v != regionVersion ||
			info.Size() != size || size < 24 {
			err = fmt.Errorf("%w: version %d, size %d", errRegion, v, size)
		}
	}
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("read %s: %w", r, err)
	}
	return f, size, nil
}

// version is what `envoy --hot-restart-version` says of the Envoy that made the region.
func (r region) version() (string, error) {
	f, size, err := r.open(os.O_RDONLY)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d.%d", regionVersion, size), f.Close()
}

// initializes says whether an epoch of the chain is being initialized, or has ended so.
func (r region) initializes() (bool, error) {
	f, size, err := r.open(os.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var flags [8]byte
	_, err = f.ReadAt(flags[:], size-8)
	return binary.NativeEndian.Uint64(flags[:])&initializing != 0, err
}

// clear takes the flag back. No epoch of the chain may be in its initialization.
func (r region) clear() error {
	f, size, err := r.open(os.O_RDWR)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 8), size-8)
	return errors.Join(err, f.Close())
}

// remove: Envoy itself never does.
func (r region) remove() { os.Remove(string(r)) }
