package iptables

import (
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pulse is a timer by timerfd_create(2), that cannot be told from a time.Ticker but by what it
// costs. For a timer of its own Go's runtime waits in epoll, which knows milliseconds alone: it
// wakes up to one too early and waits anew, and its monitor thread looks every 20 µs meanwhile. Ten
// times a second, that was as much as the rest of an idle agent.
type pulse struct {
	file  *os.File
	conn  syscall.RawConn
	every unix.Timespec
}

func newPulse(every time.Duration) (*pulse, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make a timer: %w", err)
	}
	p := &pulse{file: os.NewFile(uintptr(fd), "timer"),
		every: unix.NsecToTimespec(every.Nanoseconds())}
	if p.conn, err = p.file.SyscallConn(); err == nil {
		err = p.set(p.every)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("set a timer: %w", err)
	}
	return p, nil
}

// wait waits for the next beat; false: the pulse is closed. Reading blocks nobody, so Go's
// scheduler is not told of it: that would wake the monitor thread.
func (p *pulse) wait() bool {
	var missed [8]byte
	err := p.conn.Read(func(fd uintptr) bool {
		_, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&missed)), 8)
		return errno != unix.EAGAIN
	})
	return err == nil
}

// now has the next beat come at once, and the others after it.
func (p *pulse) now() { _ = p.set(unix.Timespec{Nsec: 1}) }

func (p *pulse) set(first unix.Timespec) error {
	var err error
	closed := p.conn.Control(func(fd uintptr) {
		err = unix.TimerfdSettime(int(fd), 0, &unix.ItimerSpec{Interval: p.every, Value: first}, nil)
	})
	if closed != nil {
		return closed
	}
	return err
}

func (p *pulse) close() { p.file.Close() }
