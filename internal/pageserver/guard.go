package pageserver

import (
	"crypto/subtle"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
)

// linkName and the token are the link, in the folder.
const linkName = "open/"

// guard lets those in who have the link, or the session that it has become.
type guard struct {
	at netip.AddrPort
	// folder is where all of it is, and the cookie's Path: "/", a name that nobody else knows, "/".
	folder         string
	token, session string
	used           atomic.Bool // the token
	next           http.Handler
}

// notAllowed is all that a stranger learns.
const notAllowed = "Not allowed.\n\n" +
	"The link that the command printed opens this page once, in one browser.\n" +
	"To open it again end the command by Ctrl-C, and start it again: it prints a new link.\n"

func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	protect(w.Header())
	path, inside := strings.CutPrefix(r.URL.Path, g.folder)
	token, opens := strings.CutPrefix(path, linkName)
	switch {
	case !g.named(r.Host):
		say(w, http.StatusMisdirectedRequest, fmt.Sprintf("Open the link as it was printed, at "+
			"http://%s. Through ssh forward the same port: -L %d:%s\n", g.at, g.at.Port(), g.at))
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		say(w, http.StatusMethodNotAllowed, "This page is only looked at.\n")
	case !inside || !shown(r):
		say(w, http.StatusForbidden, notAllowed)
	case opens:
		g.open(w, r, token)
	case !g.knows(r) || !own(r):
		say(w, http.StatusForbidden, notAllowed)
	default:
		g.next.ServeHTTP(w, r)
	}
}

// protect sets the headers of every answer. The page has one style and a form, and nothing else: no
// script, no picture, nothing from elsewhere.
func protect(h http.Header) {
	h.Set("Content-Security-Policy", page.Policy(true)+"; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Embedder-Policy", "require-corp")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
}

func say(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	fmt.Fprint(w, text)
}

// named says whether a Host header is one of ours: loopback by name or address, and this port. A
// name of somebody's that leads here is none.
func (g *guard) named(host string) bool {
	name, port, err := net.SplitHostPort(host)
	if err != nil { // browsers leave 80 out
		name, port = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"), "80"
	}
	if port != fmt.Sprint(g.at.Port()) {
		return false
	}
	switch strings.ToLower(name) {
	case "localhost", "127.0.0.1", "::1", g.at.Addr().String():
		return true
	}
	return false
}

// shown says whether, as far as the browser tells, an answer becomes what a person sees in a
// window: no frame, picture or script of another page.
func shown(r *http.Request) bool {
	return is(r, "Sec-Fetch-Mode", "navigate") && is(r, "Sec-Fetch-Dest", "document") &&
		is(r, "Origin", "http://"+r.Host)
}

// own says whether, as far as the browser tells, the person or the page itself asks. Another port
// of this address is the same site, to which the browser sends the cookie, but not the same origin.
func own(r *http.Request) bool { return is(r, "Sec-Fetch-Site", "none", "same-origin") }

// is says whether a header is absent or one of these.
func is(r *http.Request, header string, allowed ...string) bool {
	for _, have := range r.Header.Values(header) {
		ok := false
		for _, value := range allowed {
			ok = ok || have == value
		}
		if !ok {
			return false
		}
	}
	return true
}

// cookie is the name of the session: the port is in it, since one of another port would be
// replaced.
func (g *guard) cookie() string { return fmt.Sprintf("service-proxy-agent-%d", g.at.Port()) }

func (g *guard) knows(r *http.Request) bool {
	for _, c := range r.CookiesNamed(g.cookie()) { // another server may have set one, too
		if equal(c.Value, g.session) {
			return true
		}
	}
	return false
}

func equal(have, secret string) bool {
	return subtle.ConstantTimeCompare([]byte(have), []byte(secret)) == 1
}

// open makes a session of the token, once, and leads out of the link.
func (g *guard) open(w http.ResponseWriter, r *http.Request, token string) {
	switch {
	case r.Method == http.MethodHead || ahead(r):
		// Somebody looks where a link leads before a person does: that is not its one use.
		say(w, http.StatusServiceUnavailable, "")
		return
	case g.knows(r) && own(r): // the person again
	case !equal(token, g.token) || g.used.Swap(true):
		say(w, http.StatusForbidden, notAllowed)
		return
	default:
		http.SetCookie(w, &http.Cookie{Name: g.cookie(), Value: g.session, Path: g.folder,
			HttpOnly: true, SameSite: http.SameSiteStrictMode}) // not Secure: this is http
	}
	if own(r) {
		w.Header().Set("Location", g.folder)
		say(w, http.StatusSeeOther, "")
		return
	}
	// The link was clicked on another site's page, such as a terminal in a browser. What follows a
	// redirect counts as that site's, and would not be given the cookie; what this page asks for is.
	w.Header().Set("Refresh", "0; url="+g.folder)
	say(w, http.StatusOK, "The page follows. If it does not, ask for http://"+g.at.String()+
		g.folder+"\n")
}

// ahead says whether a browser fetches what a person may want to see next.
func ahead(r *http.Request) bool {
	for _, header := range []string{"Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"} {
		value := strings.ToLower(r.Header.Get(header))
		if strings.Contains(value, "prefetch") || strings.Contains(value, "preview") {
			return true
		}
	}
	return false
}
