package route

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func numbered(n int) (addrs []netip.Addr) {
	for i := range n {
		addrs = append(addrs, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	return addrs
}

// fake answers each question in order, with what says of the number in its address.
type fake struct {
	says    func(n int) []byte // an answer; its sequence number is put in, unless it has one
	answers [][]byte
}

func (f *fake) Write(questions []byte) (int, error) {
	for rest := questions; len(rest) > 0; {
		length := binary.NativeEndian.Uint32(rest)
		q := rest[:length]
		rest = rest[length:]
		a := f.says(int(q[33])<<16 | int(q[34])<<8 | int(q[35]))
		if len(a) >= 12 && binary.NativeEndian.Uint32(a[8:]) == 0 {
			copy(a[8:12], q[8:12])
		}
		f.answers = append(f.answers, a)
	}
	return len(questions), nil
}

func (f *fake) Read(b []byte) (int, error) {
	if len(f.answers) == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(b, f.answers[0])
	f.answers = f.answers[1:]
	return n, nil
}

// message is a netlink message of a type.
func message(kind uint16, sequence uint32, data ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(16+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	return append(binary.NativeEndian.AppendUint32(b, 0), data...)
}

func aRoute() []byte { return message(unix.RTM_NEWROUTE, 0, make([]byte, 12)...) }

func failed(errno unix.Errno) []byte {
	number := binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno)))
	return message(unix.NLMSG_ERROR, 0, number...)
}

func TestMissingInBatches(t *testing.T) {
	addrs := numbered(3*batch + 5)
	at := func(odd []byte, ns ...int) func(n int) []byte {
		return func(n int) []byte {
			if slices.Contains(ns, n) {
				return slices.Clone(odd)
			}
			return aRoute()
		}
	}
	for _, test := range []struct {
		name string
		says func(n int) []byte
		want map[int]string
		ok   bool
	}{
		{"all have one", at(nil), nil, true},
		{"none", at(failed(unix.ENETUNREACH), 3, batch, 3*batch+4), map[int]string{
			3: "network is unreachable", batch: "network is unreachable",
			3*batch + 4: "network is unreachable"}, true},
		{"unreachable", at(failed(unix.EHOSTUNREACH), 0), map[int]string{0: "a route of type unreachable"}, true},
		{"prohibit", at(failed(unix.EACCES), 0), map[int]string{0: "a route of type prohibit"}, true},
		{"blackhole", at(failed(unix.EINVAL), 0), map[int]string{0: "a route of type blackhole"}, true},
		{"no IPv6", at(failed(unix.EOPNOTSUPP), 0), map[int]string{0: "the kernel has no IPv6"}, true},
		{"not allowed to ask", func(n int) []byte {
			if n > batch {
				return failed(unix.EPERM)
			}
			return at(failed(unix.ENETUNREACH), 2)(n)
		}, map[int]string{2: "network is unreachable"}, false},
		{"an answer to another question", at(message(unix.RTM_NEWROUTE, 1000, 0), 9), nil, false},
		{"a short answer", at([]byte{1, 2, 3}, 9), nil, false},
		{"an empty error", at(message(unix.NLMSG_ERROR, 0), 9), nil, false},
		{"an error that is none", at(failed(0), 9), nil, false},
		{"something else", at(message(unix.RTM_NEWLINK, 0), 9), nil, false},
	} {
		got, err := missing(&fake{says: test.says}, addrs)
		var want []Failure
		for i, a := range addrs {
			if why := test.want[i]; why != "" {
				want = append(want, Failure{a, why})
			}
		}
		if !slices.Equal(got, want) || (err == nil) != test.ok {
			t.Errorf("%s: %v, %v; want %v", test.name, got, err, want)
		}
	}
}

// TestMissingEndsInTime: a look whose time is over says so, and takes nothing for unrouted.
func TestMissingEndsInTime(t *testing.T) {
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	if got, err := Missing(ctx, numbered(3)); err == nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := Missing(t.Context(), nil); err != nil || got != nil {
		t.Errorf("none asked for: %v, %v", got, err)
	}
}

// BenchmarkMissing asks for 10,000 services. The ratio is to the same questions and answers through
// a bare socket, without a look into them.
func BenchmarkMissing(b *testing.B) {
	addrs := numbered(10_000)
	var floor time.Duration
	for range 5 {
		began := time.Now()
		if err := bare(addrs); err != nil {
			b.Fatal(err)
		}
		if took := time.Since(began); floor == 0 || took < floor {
			floor = took
		}
	}
	for b.Loop() {
		if _, err := Missing(b.Context(), addrs); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(floor), "x-floor")
}

func bare(addrs []netip.Addr) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buffer := make([]byte, 8192)
	for len(addrs) > 0 {
		n := min(batch, len(addrs))
		var text []byte
		for i, a := range addrs[:n] {
			text = appendQuestion(text, uint32(i), a)
		}
		if err := unix.Sendto(fd, text, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		for range n {
			if _, _, err := unix.Recvfrom(fd, buffer, 0); err != nil {
				return err
			}
		}
		addrs = addrs[n:]
	}
	return nil
}
