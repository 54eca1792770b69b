package envoyadmin

import (
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxName is the longest name of a service, in bytes. Those of Google's are at most 63.
const maxName = 100

// ServiceName is what the control plane calls the service behind one of the listener's chains, ""
// where nothing names it: then its address must do. Forms that were seen:
//
//	chain   GLOBAL:global/PROJECT:12/FORWARDING_RULE:web/80/70636721306       Traffic Director
//	route   URL_MAP/12_web, URL_MAP/12.web, URL_MAP/12_web_0_web.example:80   Traffic Director
//	route   web.shop.svc.cluster.local:80                                     Istio
//	cluster outbound|80|v1|web.shop.svc.cluster.local                         Istio
//	chain   web, or what else somebody's own control plane calls it
//
// Traffic Director's clusters (cloud-internal-istio:cloud_mp_12_34) and Istio's listeners
// (10.0.0.1_80) name nothing. The name is a word of at most 100 bytes that can be printed
// anywhere: what is no visible character becomes "_", and of one that is too long the end is kept,
// which tells more names apart than the beginning.
func (l Listener) ServiceName(c FilterChain) string {
	cluster := c.Cluster
	if strings.Contains(cluster, ",") {
		cluster = "" // several of weighted clusters: none of them is the service
	}
	for _, try := range []struct {
		form func(string) string
		of   string
	}{
		{resource, c.Name}, {istioHost, cluster}, {urlMap, c.RouteConfig},
		{own, c.Name}, {own, c.RouteConfig}, {own, cluster},
	} {
		if try.of == "" {
			continue
		}
		if name := word(try.form(try.of)); name != "" {
			return name
		}
	}
	if l.Bound {
		return "" // it is that of all the services
	}
	return word(own(l.Name))
}

// resource is the name in the last KIND:NAME of a name of Traffic Director's.
func resource(s string) (name string) {
	if !strings.Contains(s, "/") {
		return ""
	}
	for part := range strings.SplitSeq(s, "/") {
		kind, value, found := strings.Cut(part, ":")
		if found && kind != "" && !strings.ContainsFunc(kind, noCapital) {
			name = value
		}
	}
	return name
}

func noCapital(r rune) bool { return r != '_' && (r < 'A' || r > 'Z') }

// urlMap is the name in a route configuration of Traffic Director's. A name of Google's has no
// underscore: one begins what stands behind it.
func urlMap(s string) string {
	s, found := strings.CutPrefix(s, "URL_MAP/")
	if !found {
		return ""
	}
	rest := strings.TrimLeft(s, digits)
	if rest != s && rest != "" && (rest[0] == '_' || rest[0] == '.') {
		s = rest[1:]
	}
	s, _, _ = strings.Cut(s, "_")
	return s
}

// istioHost is the host in a cluster of Istio's for outbound traffic.
func istioHost(s string) string {
	for _, parted := range []struct{ begin, by string }{{"outbound|", "|"}, {"outbound_.", "_."}} {
		if !strings.HasPrefix(s, parted.begin) {
			continue
		}
		if parts := strings.SplitN(s, parted.by, 4); len(parts) == 4 {
			return inCluster(parts[3])
		}
	}
	return ""
}

// inCluster is a host's name without what all hosts of a Kubernetes cluster have.
func inCluster(host string) string { return strings.TrimSuffix(host, ".svc.cluster.local") }

const digits = "0123456789"

// own is a name that was given by hand, as it is; "" for one that names no service: an address, a
// number, what Istio calls the way past it, an ID of Traffic Director's.
func own(s string) string {
	s, _, _ = strings.Cut(s, "?") // of a URL the rest may be a secret
	lower := strings.ToLower(s)
	switch {
	case strings.Contains(lower, "passthrough"), strings.Contains(lower, "blackhole"),
		strings.HasPrefix(lower, "inbound|"), strings.HasPrefix(lower, "virtualoutbound"),
		strings.HasPrefix(lower, "cloud-internal-istio:"):
		return ""
	case isAddress(s):
		return ""
	}
	if host, port, found := strings.Cut(s, ":"); found && strings.Trim(port, digits) == "" &&
		strings.HasSuffix(host, ".svc.cluster.local") {
		return inCluster(host)
	}
	return s
}

// isAddress says whether s is an address, with a port or without, in Envoy's form or Istio's
// (0.0.0.0_80), or a port alone.
func isAddress(s string) bool {
	if strings.Trim(s, digits) == "" {
		return true
	}
	if _, err := netip.ParseAddrPort(s); err == nil {
		return true
	}
	if at := strings.LastIndexByte(s, '_'); at >= 0 && strings.Trim(s[at+1:], digits) == "" {
		s = s[:at]
	}
	_, err := netip.ParseAddr(strings.Trim(s, "[]"))
	return err == nil
}

// word makes s fit for a line of words, wherever it is read.
func word(s string) string {
	seen := false
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return '_'
		}
		seen = seen || r != '_'
		return r
	}, s)
	if !seen {
		return ""
	}
	if len(s) <= maxName {
		return s
	}
	const mark = "…"
	from := len(s) - (maxName - len(mark))
	for !utf8.RuneStart(s[from]) {
		from++
	}
	return mark + s[from:]
}
