package conntrack

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

func TestReadLoadFiles(t *testing.T) {
	const folder = "/proc/sys/net/netfilter/"
	for _, test := range []struct {
		name       string
		count, max string // "-": not there, "!": not readable
		want       Load
		err        error // any: some error
	}{
		{"near", "250001\n", "262144\n", Load{Count: 250001, Max: 262144}, nil},
		{"no limit", "7\n", "0\n", Load{Count: 7}, nil},
		{"no conntrack", "-", "-", Load{}, ErrNoTable},
		{"going away", "7\n", "-", Load{}, ErrNoTable},
		{"hidden", "!", "!", Load{}, fs.ErrPermission},
	} {
		got, err := readLoad(func(name string) ([]byte, error) {
			text := map[string]string{folder + "nf_conntrack_count": test.count,
				folder + "nf_conntrack_max": test.max}[name]
			switch text {
			case "":
				t.Errorf("%s: read %s", test.name, name)
			case "-":
				return nil, fs.ErrNotExist
			case "!":
				return nil, fs.ErrPermission
			}
			return []byte(text), nil
		})
		if got != test.want || !errors.Is(err, test.err) {
			t.Errorf("%s: %+v, %v; want %+v, %v", test.name, got, err, test.want, test.err)
		}
	}
	if l, err := readLoad(func(string) ([]byte, error) { return []byte("many"), nil }); err == nil {
		t.Errorf("no number: %+v", l)
	}
}

// stats is what one CPU has counted, as the kernel tells it (ctnetlink_ct_stat_cpu_fill_info).
func stats(t *testing.T, counted map[uint16]uint32) netlink.Message {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	for kind, n := range counted {
		e.Uint32(kind, n)
	}
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return netlink.Message{Data: append(make([]byte, nfgenmsgLen), b...)}
}

// TestReadFull: packets that were dropped for a full table, and not those whose entry lost a race.
func TestReadFull(t *testing.T) {
	const found, earlyDrop = 2, 11
	for _, test := range []struct {
		name string
		cpus []map[uint16]uint32
		err  error // of the kernel's
		want uint64
		ok   bool
	}{
		{"nothing", []map[uint16]uint32{{found: 9}, {}}, nil, 0, true},
		{"of two CPUs", []map[uint16]uint32{{ctaStatsDrop: 3}, {ctaStatsDrop: 4, earlyDrop: 100}}, nil, 7, true},
		{"with races that were lost", []map[uint16]uint32{{ctaStatsDrop: 10, ctaStatsInsertFailed: 4}}, nil, 6, true},
		{"races alone", []map[uint16]uint32{{ctaStatsDrop: 2, ctaStatsInsertFailed: 2}, {ctaStatsInsertFailed: 9}}, nil, 0, true},
		{"without CAP_NET_ADMIN", nil, unix.EPERM, 0, true},
		{"not to be had", nil, unix.EOPNOTSUPP, 0, false},
	} {
		conn := nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
			if h := reqs[0].Header; h.Type != 1<<8|4 || h.Flags != netlink.Request|netlink.Dump {
				t.Errorf("%s: asked %+v", test.name, h)
			}
			if test.err != nil {
				return nil, test.err
			}
			var msgs []netlink.Message
			for _, cpu := range test.cpus {
				m := stats(t, cpu)
				m.Header.Sequence, m.Header.PID = reqs[0].Header.Sequence, reqs[0].Header.PID
				msgs = append(msgs, m)
			}
			return nltest.Multipart(append(msgs, netlink.Message{Header: netlink.Header{
				Sequence: reqs[0].Header.Sequence, PID: reqs[0].Header.PID}, Data: make([]byte, 4)}))
		})
		if got, err := readFull(conn); got != test.want || (err == nil) != test.ok {
			t.Errorf("%s: %d, %v; want %d", test.name, got, err, test.want)
		}
	}
}
