package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/users"
)

// trust lets the admin interface's answers count only when the proxy's user or root holds its
// socket: any local user can listen on the port while Envoy is down. The user is looked up at each
// new connection, since bootstrap may create it after the daemon was started. byRoot is told
// whether it was root.
func trust(user string, byRoot *atomic.Bool) func(net.Conn) error {
	return func(c net.Conn) error {
		trusted := []uint32{0}
		if proxy := proxyIDs(user, users.IDs); proxy.Err == nil {
			trusted = append(trusted, proxy.UID)
		}
		uid, err := heldBy(c, trusted)
		if err == nil {
			byRoot.Store(uid == 0)
		}
		return err
	}
}

// heldBy is whose socket is at the other end; that it is none of the trusted users' is an error.
func heldBy(c net.Conn, trusted []uint32) (uid uint32, err error) {
	if u, ok := c.(*net.UnixConn); ok {
		peer, err := sockdiag.PeerOfUnix(u)
		if err == nil && !slices.Contains(trusted, peer.UID) {
			err = &sockdiag.ForeignError{UID: peer.UID}
		}
		return peer.UID, err
	}
	// Both: who answers on this connection, which may have been made before the listener changed
	// hands, and who listens, since a socket can be handed to another process.
	uid, err = sockdiag.PeerOwner(c)
	if err != nil {
		return uid, err
	}
	if !slices.Contains(trusted, uid) {
		return uid, &sockdiag.ForeignError{Addr: remoteAddr(c), UID: uid}
	}
	return uid, sockdiag.OwnedBy(remoteAddr(c), trusted...)
}

// answersAsEnvoy says whether the foreign user that this error of the admin interface tells of runs
// an Envoy there. That decides nothing but the words of a finding: any user can answer so.
func answersAsEnvoy(admin string) func(context.Context, error) bool {
	return func(ctx context.Context, err error) bool {
		var foreign *sockdiag.ForeignError
		if !errors.As(err, &foreign) {
			return false
		}
		client, err := envoyadmin.New(admin)
		if err != nil {
			return false
		}
		defer client.Close()
		client.Trust = func(c net.Conn) error {
			_, err := heldBy(c, []uint32{foreign.UID})
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		info, err := client.ServerInfo(ctx)
		return err == nil && info.Version != (envoyadmin.Version{})
	}
}

func remoteAddr(c net.Conn) (a netip.AddrPort) {
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		a = t.AddrPort()
	}
	return a
}
