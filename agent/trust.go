package agent

import (
	"net"
	"net/netip"
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
)

// trust lets the admin interface's answers count only when the proxy's user or root holds its
// socket: any local user can listen on the port while Envoy is down. The user is looked up at each
// new connection, since bootstrap may create it after the daemon was started.
func trust(user string) func(net.Conn) error {
	return func(c net.Conn) error {
		trusted := []uint32{0}
		if proxy := proxyIDs(user, userIDs); proxy.Err == nil {
			trusted = append(trusted, proxy.UID)
		}
		if u, ok := c.(*net.UnixConn); ok {
			peer, err := sockdiag.PeerOfUnix(u)
			if err != nil {
				return err
			}
			if !slices.Contains(trusted, peer.UID) {
				return &sockdiag.ForeignError{UID: peer.UID}
			}
			return nil
		}
		// Both: who answers on this connection, which may have been made before the listener changed
		// hands, and who listens, since a socket can be handed to another process.
		uid, err := sockdiag.PeerOwner(c)
		if err != nil {
			return err
		}
		if !slices.Contains(trusted, uid) {
			return &sockdiag.ForeignError{Addr: remoteAddr(c), UID: uid}
		}
		return sockdiag.OwnedBy(remoteAddr(c), trusted...)
	}
}

func remoteAddr(c net.Conn) (a netip.AddrPort) {
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		a = t.AddrPort()
	}
	return a
}
