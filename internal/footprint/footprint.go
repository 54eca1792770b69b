// Package footprint keeps small what a daemon holds of a machine's memory while it has nothing to
// do. A piece of work leaves two things behind: memory that Go's collector has freed and keeps for
// the next time, and the pages of the program that only this work needed.
//
// It knows nothing of the work: package agent says when there was some (Rest.After).
package footprint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// calm is how long nothing was done before something is given back: what is given back between
	// two changes has to be fetched again.
	calm = 3 * time.Second
	// pause is the least time between two: one costs a collection, 20 ms of a core at 10,000
	// services.
	pause = 30 * time.Second
)

// Rest gives memory back after work.
type Rest struct {
	// Give gives it back: Give of this package.
	Give func() error
}

// After waits for work, and then until there was none for three seconds, and gives back; not more
// often than each 30 seconds. It returns when ctx ends. An error of Give is told to failed, once for
// all.
func (r Rest) After(ctx context.Context, work <-chan struct{}, failed func(error)) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-work:
		}
		for timer := time.NewTimer(calm); timer != nil; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-work:
				timer.Reset(calm)
			case <-timer.C:
				timer = nil
			}
		}
		if err := r.Give(); err != nil && failed != nil {
			failed(err)
			failed = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// Give gives back what Go holds and does not need, and the pages of this program: those that are
// needed come again with the first use, from the page cache, at some microseconds each. Half of them
// are of no use after the start (the descriptors of protobuf's types, for one), and where the kernel
// maps a file by large folios (6.18) nearly all of a program is mapped in the first second.
func Give() error {
	debug.FreeOSMemory()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range ofProgram(maps, path) {
		// MADV_DONTNEED only takes the pages out of this process's page table, as these mappings are of
		// a file and never written (madvise(2)).
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.from, m.to-m.from,
			unix.MADV_DONTNEED); errno != 0 {
			errs = append(errs, fmt.Errorf("madvise %x-%x: %w", m.from, m.to, errno))
		}
	}
	return errors.Join(errs...)
}

type mapping struct{ from, to uintptr }

// ofProgram are the mappings of a program's file that cannot be written, in the form of
// proc_pid_maps(5). What can be written must not be given back: it would be as the file is again.
func ofProgram(maps []byte, path string) (some []mapping) {
	for line := range bytes.Lines(maps) {
		// from-to rwxp offset device inode path, which may hold blanks
		fields := bytes.Fields(line)
		if len(fields) < 6 || len(fields[1]) != 4 || bytes.ContainsRune(fields[1], 'w') ||
			!bytes.HasSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte(" "+path)) {
			continue
		}
		from, to, _ := bytes.Cut(fields[0], []byte("-"))
		a, err1 := strconv.ParseUint(string(from), 16, 64)
		b, err2 := strconv.ParseUint(string(to), 16, 64)
		if err1 == nil && err2 == nil && a < b {
			some = append(some, mapping{uintptr(a), uintptr(b)})
		}
	}
	return some
}
