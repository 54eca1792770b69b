package xtables

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// entry is one of the given length with counters and all else set.
func entry(l layout, length int) []byte {
	e := make([]byte, length)
	for n := range e {
		e[n] = 0xff
	}
	binary.NativeEndian.PutUint16(e[l.next:], uint16(length))
	return e
}

// Whatever the kernel answers, the walk ends, and only counters go.
func TestClearCounters(t *testing.T) {
	for _, l := range []layout{layout4, layout6} {
		head := l.counters + counterLength
		for _, test := range []struct {
			name    string
			entries []byte
			number  int
		}{
			{"none", nil, 0},
			{"a head alone", entry(l, head), 1},
			{"two", append(entry(l, head+40), entry(l, head+8)...), 2},
			{"cut within a head", append(entry(l, head+40), 1, 2, 3), -1},
			{"longer than there is", entry(l, head+40)[:head+8], -1},
			{"one that leads to itself", make([]byte, head), -1},
		} {
			if number := l.clearCounters(test.entries); number != test.number {
				t.Errorf("%s: %d entries, want %d", test.name, number, test.number)
			}
		}
		e := entry(l, head+40)
		l.clearCounters(e)
		for n, b := range e {
			counter := n >= l.counters && n < head
			length := n == l.next || n == l.next+1
			if !length && (b == 0) != counter {
				t.Errorf("byte %d is %d", n, b)
			}
		}
	}
}

func TestErrors(t *testing.T) {
	for errno, want := range map[error]error{
		unix.EPERM: ErrRefused, unix.EACCES: ErrRefused, unix.ENOENT: ErrNoTable,
		unix.ENOPROTOOPT: ErrNoTable, unix.EAFNOSUPPORT: ErrNoTable, unix.EINVAL: ErrABI,
		unix.EAGAIN: unix.EAGAIN, unix.ENOMEM: unix.ENOMEM,
	} {
		if err := classify(errno); !errors.Is(err, want) || !errors.Is(err, errno) {
			t.Errorf("%v is %v, want %v", errno, err, want)
		}
	}
}
