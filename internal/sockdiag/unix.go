package sockdiag

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// UnixPeer is who is at the other end of a Unix socket's connection: the process that called
// connect(2), or, asked by that one, the process that called listen(2) (SO_PEERCRED, unix(7)). The
// kernel noted it then; the process may be gone.
type UnixPeer struct {
	PID int
	UID uint32
}

// PeerOfUnix asks for it. c must be a Unix socket.
func PeerOfUnix(c net.Conn) (UnixPeer, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return UnixPeer{}, fmt.Errorf("look up peer: %T is no Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return UnixPeer{}, fmt.Errorf("look up peer: %w", err)
	}
	var cred *unix.Ucred
	controlErr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if controlErr != nil {
		err = controlErr
	}
	if err != nil {
		return UnixPeer{}, fmt.Errorf("look up peer: %w", err)
	}
	return UnixPeer{PID: int(cred.Pid), UID: cred.Uid}, nil
}
