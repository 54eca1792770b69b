package conntrack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoTable says that this machine has no connection tracking.
var ErrNoTable = errors.New("no connection tracking")

// From linux/netfilter/nfnetlink_conntrack.h.
const (
	msgGetStatsCPU       = 4
	ctaStatsInsertFailed = 9
	ctaStatsDrop         = 10
)

// Load is how full the table of this network namespace is.
type Load struct {
	Count, Max int // entries; Max is 0 where there is no limit
	// Full is how many packets were dropped since the boot because the table was full, at least.
	Full uint64
}

// ReadLoad reads it. [ErrNoTable] where the module is not loaded, and asking does not load it. Full
// needs CAP_NET_ADMIN and stays 0 without.
func ReadLoad(ctx context.Context) (Load, error) {
	l, err := readLoad(os.ReadFile)
	if err != nil {
		return Load{}, err
	}
	conn, err := dialLimited(ctx)
	if err != nil {
		return Load{}, fmt.Errorf("read conntrack statistics: %w", err)
	}
	defer conn.Close()
	l.Full, err = readFull(conn)
	return l, err
}

// readLoad reads the figures that sysctl shows: anybody may read them, also where a unit has
// ProtectKernelTunables=. The folder is that of the thread's namespace, as netlink's answers are.
func readLoad(readFile func(string) ([]byte, error)) (l Load, err error) {
	for name, figure := range map[string]*int{"nf_conntrack_count": &l.Count,
		"nf_conntrack_max": &l.Max} {
		b, err := readFile("/proc/sys/net/netfilter/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			return Load{}, fmt.Errorf("read conntrack's load: %w: %w", ErrNoTable, err)
		}
		if err != nil {
			return Load{}, fmt.Errorf("read conntrack's load: %w", err)
		}
		if *figure, err = strconv.Atoi(string(bytes.TrimSpace(b))); err != nil {
			return Load{}, fmt.Errorf("read conntrack's load: %s: %w", name, err)
		}
	}
	return l, nil
}

// readFull sums up what each CPU has counted. The kernel counts a packet as dropped for a full
// table ("Too stressed to deal" in nf_conntrack_in) and for a race that its entry lost
// (nf_ct_resolve_clash), which two DNS questions from one socket are enough for. Only the second
// counts as a failed insertion, too: the difference is of the first.
// See docs/design/facts.md#conntrack-counts-drops.
func readFull(conn *netlink.Conn) (uint64, error) {
	answers, err := conn.Execute(request(msgGetStatsCPU, unix.AF_UNSPEC,
		netlink.Request|netlink.Dump, nil))
	if errors.Is(err, unix.EPERM) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read conntrack statistics: %w", err)
	}
	var dropped, lost uint64
	for _, m := range answers {
		if len(m.Data) < nfgenmsgLen {
			continue
		}
		d, err := netlink.NewAttributeDecoder(m.Data[nfgenmsgLen:])
		if err != nil {
			return 0, fmt.Errorf("read conntrack statistics: %w", err)
		}
		d.ByteOrder = binary.BigEndian
		for d.Next() {
			switch d.Type() {
			case ctaStatsDrop:
				dropped += uint64(d.Uint32())
			case ctaStatsInsertFailed:
				lost += uint64(d.Uint32())
			}
		}
		if err := d.Err(); err != nil {
			return 0, fmt.Errorf("read conntrack statistics: %w", err)
		}
	}
	return dropped - min(lost, dropped), nil
}
