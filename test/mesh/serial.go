package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Serial is the pty that stands for /dev/ttyS0. What is written there goes to a reader, as gcloud
// is one, and a test takes that away: by Hang, Slow or Refuse, each of which lasts until Mend.
// Nonsense is no fault of it: nothing is read from a serial port.
//
// The agent finds it by a link, so that the device can go and another one come.
type Serial struct {
	Path string
	to   io.Writer

	mu         sync.Mutex
	turn       sync.Cond // state and parked change
	state      serialState
	parked     bool // the reader reads nothing
	perSecond  int  // bytes; when slow
	pty, slave *os.File
}

type serialState int

const (
	drained serialState = iota
	hung
	slow
	refused
)

// openSerial makes one, with its link at path.
func openSerial(path string, to io.Writer) (*Serial, error) {
	s := &Serial{Path: path, to: to}
	s.turn.L = &s.mu
	s.mu.Lock()
	defer s.mu.Unlock()
	return s, s.plug()
}

// Close ends it: it hangs up.
func (s *Serial) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unplug()
}

// plug makes a pty and reads it; s.mu is held.
func (s *Serial) plug() error {
	// Not by Fd(), which would make it one that blocks, and its reads deaf to deadlines.
	open := func(path string) (*os.File, error) {
		return os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	}
	pty, err := open("/dev/ptmx")
	if err != nil {
		return fmt.Errorf("open a pty: %w", err)
	}
	n := 0
	conn, err := pty.SyscallConn()
	if err == nil {
		err = errors.Join(err, conn.Control(func(fd uintptr) {
			if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
				n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
			}
		}))
	}
	// Held open, or reading fails with EIO whenever the agent is not there.
	var slave *os.File
	if err == nil {
		slave, err = open(fmt.Sprintf("/dev/pts/%d", n))
	}
	if err == nil {
		err = os.Symlink(slave.Name(), s.Path)
	}
	if err != nil {
		pty.Close()
		return fmt.Errorf("make a pty: %w", err)
	}
	s.pty, s.slave, s.state, s.parked = pty, slave, drained, false
	go s.read(pty)
	return nil
}

// unplug hangs up, and leaves nothing at the path; s.mu is held.
func (s *Serial) unplug() {
	if s.state == refused {
		return
	}
	os.Remove(s.Path)
	s.slave.Close()
	s.pty.Close()
	s.state = refused
	s.turn.Broadcast()
}

// read hands on what is written, until the pty is closed.
func (s *Serial) read(pty *os.File) {
	buf := make([]byte, 4096)
	for {
		s.mu.Lock()
		for s.pty == pty && s.state == hung {
			s.parked = true
			s.turn.Broadcast()
			s.turn.Wait()
		}
		s.parked = false
		most := len(buf)
		if s.state == slow {
			most = max(s.perSecond/10, 1)
		}
		s.mu.Unlock()
		if most < len(buf) {
			time.Sleep(100 * time.Millisecond)
		}
		n, err := pty.Read(buf[:most])
		s.to.Write(bytes.ReplaceAll(buf[:n], []byte{0}, nil)) // less what fill has put there
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
	}
}

// Hang has nobody read. The kernel's buffer, which has 64 KiB and would hide that for long, is
// filled: whoever writes next is blocked.
func (s *Serial) Hang() error { return s.stop(hung, 0) }

// Slow has so many bytes read a second, at least 10, behind a full buffer as with Hang.
func (s *Serial) Slow(perSecond int) error { return s.stop(slow, perSecond) }

func (s *Serial) stop(state serialState, perSecond int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = hung
	if err := s.pty.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("stop reading the pty: %w", err)
	}
	for !s.parked {
		s.turn.Wait()
	}
	if err := fill(s.slave); err != nil {
		return fmt.Errorf("fill the pty: %w", err)
	}
	if state == slow {
		s.state, s.perSecond = slow, perSecond
		s.turn.Broadcast()
		return s.pty.SetReadDeadline(time.Time{})
	}
	return nil
}

// fill writes zeros until no more are taken, nor for half a second: a worker of the kernel's moves
// them from one buffer into another, and a busy machine has it wait.
func fill(slave *os.File) error {
	conn, err := slave.SyscallConn()
	if err != nil {
		return err
	}
	for full := 0; full < 20; full++ {
		var failed error
		err = conn.Write(func(fd uintptr) bool {
			for n := 0; failed == nil; {
				if n, failed = unix.Write(int(fd), make([]byte, 1024)); n > 0 {
					full = 0
				}
			}
			return true
		})
		if err != nil || !errors.Is(failed, unix.EAGAIN) {
			return errors.Join(err, failed)
		}
		time.Sleep(25 * time.Millisecond)
	}
	return nil
}

// Refuse takes the device away: whoever has it open gets EIO, and there is none to open.
func (s *Serial) Refuse() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unplug()
	return nil
}

// Mend ends the fault.
func (s *Serial) Mend() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == refused {
		return s.plug()
	}
	s.state = drained
	s.turn.Broadcast()
	return s.pty.SetReadDeadline(time.Time{})
}
