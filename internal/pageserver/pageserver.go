// Package pageserver shows the page of package page, live, to one browser: `status --serve`. It
// runs in that command's process until Ctrl-C. The daemon never does this, and has no listener
// more.
//
// # What it defends, and against whom
//
// The page tells how the VM is made (services, addresses, rules, log lines), to whom the command's
// user, root as a rule, shows it. It only tells: nothing can be changed here, and no connection is
// made (explain without --try). Against these it is defended:
//
//   - The network. It listens on loopback alone. There is no TLS, so from afar it is looked at
//     through ssh, which asks who it is. [Address] refuses any other address.
//   - Other users of this machine, and of that on which ssh's forwarded port listens: loopback is
//     everybody's. Nothing is told without a session: the link that is printed has a token of 130
//     bits that works once, and becomes a cookie of as many. Neither is in an argument, an
//     environment variable or a log. Who is refused learns nothing of the VM.
//   - Web pages open in the same browser. A site that has its name lead to 127.0.0.1 (DNS
//     rebinding) is told by the Host header. Another site cannot send the cookie along
//     (SameSite=Strict), and where the browser says who asks (Sec-Fetch-*, Origin) anything but
//     the page itself or the person is refused. Frames, windows and resources of others are shut
//     out by the policy headers.
//   - Other servers at 127.0.0.1. Cookies know no port: a browser sends them there, too. So this
//     one is of a folder whose name nobody else knows, and not of "/".
//   - What others wrote and the page shows: it is escaped by package page, and the policy lets no
//     script, no image, no request to elsewhere happen if that should fail.
//   - Callers that are slow or many: the limits of package server. Looks are made one at a time for
//     all who ask, with a pause in between, since each costs Envoy's main thread something.
//
// It does not help where somebody is root on the VM or in the browser's account: they see as much
// without it. A user of the machine can take all of the few connections, and keep the page from
// being shown; `status` and `doctor` tell the same in text.
//
// [guard] decides who is let in, [site] answers, and looks are shared by [looks].
package pageserver

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
)

// Pages is what is shown.
type Pages struct {
	Host string // whose pages these are
	// Look makes the page's content anew. It is called once at a time.
	Look func(context.Context) page.Content
	// Explain answers the form, whose fields package page names. It is called once at a time, and
	// given explainLimit. What it returns is shown in its lines.
	Explain func(context.Context, url.Values) string
}

// Server shows Pages to who has its link. Make it with [Listen].
type Server struct {
	listener net.Listener
	folder   string // guard's
	token    string
	pages    Pages
}

// Address reads HOST:PORT as where to listen, which may be loopback only.
func Address(text string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not ADDRESS:PORT; as in 127.0.0.1:15080", text)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not a port from 0 (any that is free) to 65535", port)
	}
	if host == "localhost" {
		host = "127.0.0.1" // it may be several addresses, of which somebody else could have one
	}
	addr, err := netip.ParseAddr(host)
	if addr = addr.Unmap(); err != nil || !addr.IsLoopback() || addr.Zone() != "" {
		return netip.AddrPort{}, fmt.Errorf("%q is not this machine's loopback (127.0.0.1, [::1]): the "+
			"page tells how the VM is made, and has no TLS, so that it is shown to this machine alone; "+
			"to look from afar, serve it on 127.0.0.1 and forward the port: "+
			"`gcloud compute ssh VM -- -L %[2]d:127.0.0.1:%[2]d`", host, forwarded(n))
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// forwarded is the port to name in an example.
func forwarded(port uint64) uint64 {
	if port == 0 {
		return 15080
	}
	return port
}

// Listen opens a loopback address that a flag gave. An address in use is a *[server.ListenError].
func Listen(ctx context.Context, flag string, at netip.AddrPort, pages Pages) (*Server, error) {
	l, err := server.Listen(ctx, flag, at.String())
	if err != nil {
		return nil, err
	}
	folder := "/" + rand.Text()[:16] + "/"
	return &Server{listener: l, folder: folder, token: rand.Text(), pages: pages}, nil
}

// Addr is where it listens.
func (s *Server) Addr() netip.AddrPort {
	return s.listener.Addr().(*net.TCPAddr).AddrPort()
}

// Link opens the page, once. It is a secret until then.
//
// It names the address and never localhost, of which another user could have the other family's.
func (s *Server) Link() string {
	return "http://" + s.Addr().String() + s.folder + linkName + s.token
}

// Run serves until ctx ends, and returns nil then, within half a second: a look or an answer that
// is under way is left behind.
func (s *Server) Run(ctx context.Context) error {
	return server.Serve(ctx, s.listener, s.handler(ctx))
}

func (s *Server) handler(ctx context.Context) http.Handler {
	pages := &site{host: s.pages.Host, explain: s.pages.Explain, asking: make(chan struct{}, 1),
		looks: looks{ctx: ctx, look: s.pages.Look}}
	return &guard{at: s.Addr(), folder: s.folder, token: s.token, session: rand.Text(),
		next: http.StripPrefix(strings.TrimSuffix(s.folder, "/"), pages)}
}
