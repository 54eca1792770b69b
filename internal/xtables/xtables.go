// Package xtables asks the kernel how a table of iptables-legacy stands, by the socket options that
// iptables-legacy itself reads by, and without running a program. It does not say what the rules
// are: it says whether they are still those of before. Package iptables reads them, by
// iptables-legacy-save, when they are not.
//
// Measured with 10,000 rules (BenchmarkLook, Linux 6.18): an Info takes 5 µs, a Print 6 ms, an
// iptables-legacy-save 17 ms and its parsing more.
//
// To ask makes the table. Like all of the table's socket options, both make it, and load its
// module, where it is not there yet: ask only for one that is.
// See docs/design/facts.md#legacy-look-makes-the-table.
package xtables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Why there is no answer, for errors.Is.
var (
	// ErrRefused: CAP_NET_ADMIN is missing, or a sandbox forbids the call.
	ErrRefused = errors.New("not permitted to ask for the table")
	// ErrNoTable: the kernel has no ip_tables (ip6_tables), or not this table.
	ErrNoTable = errors.New("the kernel has no such table")
	// ErrABI: the kernel lays out its answer in another way, as it does for 32-bit programs.
	ErrABI = errors.New("the kernel's tables are laid out otherwise")
	// ErrBusy: others change the table so fast that no look at it ended between two changes.
	ErrBusy = errors.New("the table changes while it is looked at")
)

// Info is what the kernel tells of a table in one cheap call: it moves with every change of the
// number of rules, of their size, and of where a built-in chain begins or ends. A rule that is
// replaced by one of the same size, or two that change places, leave it as it is.
type Info struct {
	Hooks            uint32    // the table's, as bits
	Entry, Underflow [5]uint32 // where each hook's chain begins and where its policy is, in bytes
	Number           uint32    // of entries: rules, and two for each chain
	Size             uint32    // of all entries in bytes
}

// Print is an Info with a hash of all entries but for their packet and byte counters: equal ones
// are of equal rules. The hash's seed is this process's, so a Print means nothing to another one.
type Print struct {
	Info
	Sum uint64
}

// Socket is where one family's tables are asked for, in the network namespace in which it was
// opened. It may be used by several goroutines.
type Socket struct {
	file   *os.File
	conn   syscall.RawConn // of file: a call holds off Close, and finds a closed one closed
	level  int
	layout layout
}

// layout is where things are in the entries of a family (struct ipt_entry, struct ip6t_entry), on
// 64 bits.
type layout struct {
	next     int // where next_offset is: two bytes
	counters int // where the two counters are: 16 bytes, the last of the head
}

const (
	getInfo    = 64 // IPT_SO_GET_INFO and IP6T_SO_GET_INFO
	getEntries = 65 // IPT_SO_GET_ENTRIES and IP6T_SO_GET_ENTRIES

	nameLength    = 32 // XT_TABLE_MAXNAMELEN
	infoLength    = nameLength + 4*(1+5+5+2)
	sizeAt        = nameLength     // of struct ipt_get_entries
	entriesAt     = nameLength + 8 // they begin at a multiple of 8
	counterLength = 16
	// sizeLimit is what a table may have: the kernel takes no larger one (XT_MAX_TABLE_SIZE).
	sizeLimit = 512 << 20
	attempts  = 5
)

var (
	layout4 = layout{next: 90, counters: 96}
	layout6 = layout{next: 142, counters: 152}
)

var seed = maphash.MakeSeed()

// Open makes a socket for unix.AF_INET or unix.AF_INET6.
func Open(family int) (*Socket, error) {
	s := &Socket{level: unix.IPPROTO_IP, layout: layout4}
	if family == unix.AF_INET6 {
		s.level, s.layout = unix.IPPROTO_IPV6, layout6
	}
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return nil, fmt.Errorf("open a socket for tables: %w", ErrABI)
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a socket for tables: %w", classify(err))
	}
	s.file = os.NewFile(uintptr(fd), "tables")
	if s.conn, err = s.file.SyscallConn(); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("open a socket for tables: %w", err)
	}
	return s, nil
}

// Close closes the socket; what is asked later is os.ErrClosed.
func (s *Socket) Close() error { return s.file.Close() }

// Info asks for the Info of a table, and makes one that is not there.
func (s *Socket) Info(table string) (Info, error) {
	var answer [infoLength]byte
	if err := s.get(getInfo, table, answer[:]); err != nil {
		return Info{}, fmt.Errorf("ask for table %q: %w", table, err)
	}
	number := func(n int) uint32 { return binary.NativeEndian.Uint32(answer[nameLength+4*n:]) }
	info := Info{Hooks: number(0), Number: number(11), Size: number(12)}
	for hook := range 5 {
		info.Entry[hook], info.Underflow[hook] = number(1+hook), number(6+hook)
	}
	return info, nil
}

// Print asks for the Print of a table, and makes one that is not there. ErrBusy where others kept
// changing it meanwhile.
func (s *Socket) Print(table string) (Print, error) {
	before, err := s.Info(table)
	if err != nil {
		return Print{}, err
	}
	for range attempts {
		sum, err := s.sum(table, before)
		now, infoErr := s.Info(table)
		switch {
		case infoErr != nil:
			return Print{}, infoErr
		// EAGAIN: the size was another one by then. One with other rules of the same size is read, and
		// its number is no sign of another layout.
		case errors.Is(err, unix.EAGAIN), now != before:
			before = now
		case err != nil:
			return Print{}, fmt.Errorf("read table %q: %w", table, err)
		default:
			return Print{Info: now, Sum: sum}, nil
		}
	}
	return Print{}, fmt.Errorf("read table %q: %w", table, ErrBusy)
}

// sum hashes the entries of a table of this Info.
func (s *Socket) sum(table string, of Info) (uint64, error) {
	if of.Size > sizeLimit {
		return 0, fmt.Errorf("%w: %d bytes of entries", ErrABI, of.Size)
	}
	// 1.5 MB at 10,000 rules, each few seconds: given back at once, it is nobody's garbage. It must
	// be of zeros, since the kernel leaves what follows the end of a name as it was.
	answer, err := unix.Mmap(-1, 0, entriesAt+int(of.Size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(answer) //nolint:errcheck // it was mapped right above
	binary.NativeEndian.PutUint32(answer[sizeAt:], of.Size)
	if err := s.get(getEntries, table, answer); err != nil {
		return 0, err
	}
	entries := answer[entriesAt:]
	if number := s.layout.clearCounters(entries); number != int(of.Number) {
		return 0, fmt.Errorf("%w: %d entries, not %d", ErrABI, number, of.Number)
	}
	return maphash.Bytes(seed, entries), nil
}

// clearCounters takes the packet and byte counters out of a table's entries, and says how many
// there are; -1 if they do not add up.
func (l layout) clearCounters(entries []byte) (number int) {
	head := l.counters + counterLength
	for len(entries) > 0 {
		if len(entries) < head {
			return -1
		}
		next := int(binary.NativeEndian.Uint16(entries[l.next:]))
		if next < head || next > len(entries) {
			return -1
		}
		clear(entries[l.counters:head])
		entries = entries[next:]
		number++
	}
	return number
}

// get is getsockopt(2) with a value that goes both ways, for which x/sys has no function.
func (s *Socket) get(option int, table string, value []byte) error {
	copy(value[:nameLength-1], table)
	length := uint32(len(value))
	var errno unix.Errno
	if err := s.conn.Control(func(fd uintptr) {
		// An Info is asked for so often that what Go does around a call that may block is dearer than
		// the call. It waits at most while others swap a table in, which takes milliseconds.
		if option == getInfo {
			_, _, errno = unix.RawSyscall6(unix.SYS_GETSOCKOPT, fd, uintptr(s.level), uintptr(option),
				uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&length)), 0)
			return
		}
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(s.level), uintptr(option),
			uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&length)), 0)
	}); err != nil {
		return fmt.Errorf("%w: %w", os.ErrClosed, err) // Control has no other reason, and does not say so
	}
	switch {
	case errno != 0:
		return classify(errno)
	case int(length) != len(value):
		return fmt.Errorf("%w: %d bytes, not %d", ErrABI, length, len(value))
	}
	return nil
}

// classify says what a call's error means here.
func classify(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.ENOENT),
		errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%w: %w", ErrNoTable, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", ErrABI, err)
	}
	return err
}
