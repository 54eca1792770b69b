// Package attribute is the gce-service-proxy metadata attribute as a type: it parses and
// validates what gcloud writes (compute instance-templates create --service-proxy …) and does
// nothing else. It reads no metadata server and decides nothing: internal/metadata fetches and
// watches the text, agent.Desired and the Envoy configuration that internal/bootstrap writes are
// what a Config turns into. See docs/design/facts.md#gce-attribute.
//
// The text is written by people, by way of gcloud, Terraform or an editor. A value of the wrong
// type or out of range is a *KeyError that names the key by its path; a key that this version does
// not know is listed in Config.Unknown and otherwise ignored, so that a newer gcloud does not
// break an older agent.
package attribute

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode"
)

// Name is the metadata attribute's name and the key that a KeyError names when the text as
// a whole is malformed.
const Name = "gce-service-proxy"

// MaxSize is the most bytes of text that Parse reads: Compute Engine limits all metadata entries of
// a VM together to 512 KB (https://cloud.google.com/compute/docs/metadata/setting-custom-metadata),
// so more cannot come from there.
const MaxSize = 512 << 10

// ErrMissing is what a VM without the attribute gets; who reads the metadata
// server returns it, wrapped.
var ErrMissing = errors.New("this VM has no metadata attribute " + Name)

// ErrAnthos is returned for the attribute's Anthos Service Mesh form ("mode": "ON", "asm-config"),
// which another agent serves.
var ErrAnthos = errors.New(
	"the attribute has the Anthos Service Mesh form (mode, asm-config), which this agent does not " +
		"serve; create the template with --service-proxy enabled and without --mesh")

// KeyError says which key of the attribute is malformed and why. Its text is one line, and
// never holds a URL's query.
type KeyError struct {
	Key    string // path of the key, such as "service.serving-ports[1]"
	Reason string
}

func (e *KeyError) Error() string {
	return fmt.Sprintf("attribute %s: key %s: %s", Name, e.Key, e.Reason)
}

// PortRange is First to Last, both included; First ≤ Last.
type PortRange struct{ First, Last uint16 }

// Config is what the attribute asks for. The zero value of a field means that its key is not given,
// except ProxyPort, which is never 0 in a Config from Parse or Default.
type Config struct {
	ServingPorts []uint16 // sorted, each once

	InterceptAllOutbound      bool
	ExcludeOutboundIPRanges   []netip.Prefix // masked; a bare address is a prefix of full length
	ExcludeOutboundPortRanges []PortRange    // reversed ranges, which gcloud lets through, are swapped
	InterceptDNS              bool

	Labels map[string]string // any text

	ProxyPort       uint16 // 1025 to 65535
	Tracing         bool
	AccessLog       string // absolute path, without control characters
	Network         string // "": the VM's own network
	Scope           string
	Mesh            string // Network is ignored by the control plane when it is set
	ProjectNumber   string // digits; "": the VM's own project
	PrimarySource   string // URL of an Envoy archive: gs, https or file
	SecondarySource string
	XDSVersion      int // 3

	Unknown  []string // paths of keys this version does not know, sorted
	Warnings []string // what is accepted but advised against, one line each
}

// Default is the Config of a VM without the attribute (--config none).
func Default() Config {
	return Config{ProxyPort: OutboundPort, XDSVersion: 3}
}

// Parse reads the attribute's text. It returns a *KeyError for the first malformed value, in the
// order in which the keys are documented, and ErrAnthos for the Anthos form.
func Parse(text []byte) (Config, error) {
	if len(text) > MaxSize {
		return Config{},
			&KeyError{Name, fmt.Sprintf("%d bytes of text, want at most %d", len(text), MaxSize)}
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	var doc any
	if err := dec.Decode(&doc); err != nil {
		return Config{}, &KeyError{Name, "not JSON: " + syntaxReason(text, err)}
	}
	if _, err := dec.Token(); err != io.EOF {
		return Config{}, &KeyError{
			Name, fmt.Sprintf("not JSON: more text after the value, at byte %d", dec.InputOffset())}
	}
	fields, ok := doc.(map[string]any)
	if !ok {
		return Config{}, &KeyError{Name, "want an object, have " + typeName(doc)}
	}
	if isAnthos(fields) {
		return Config{}, ErrAnthos
	}

	r := reader{}
	cfg := Default()
	top := object{r: &r, fields: fields}
	top.ignore("_disclaimer")
	if v := top.text("api-version"); v != "" && v != "0.2" {
		cfg.Warnings = append(
			cfg.Warnings, fmt.Sprintf("api-version: %q is not the version this agent knows, 0.2", v))
	}

	// First: the proxy's port is one that serving-ports may not name.
	top.proxySpec(&cfg)

	service := top.object("service")
	cfg.ServingPorts = service.servingPorts("serving-ports", cfg.ProxyPort)
	if slices.Contains(cfg.ServingPorts, 22) {
		cfg.Warnings = append(cfg.Warnings,
			"service.serving-ports: 22 sends SSH through Envoy; a broken mesh then locks you out")
	}
	service.rest()

	traffic := top.object("traffic-interception")
	cfg.InterceptAllOutbound = traffic.flag("intercept-all-outbound")
	cfg.ExcludeOutboundIPRanges = traffic.prefixes("exclude-outbound-ip-ranges")
	cfg.ExcludeOutboundPortRanges = traffic.portRanges("exclude-outbound-port-ranges")
	cfg.InterceptDNS = traffic.flag("intercept-dns")
	traffic.rest()

	cfg.Labels = top.texts("labels")
	top.rest()

	if r.err != nil {
		return Config{}, r.err
	}
	sort.Strings(r.unknown)
	cfg.Unknown = r.unknown
	return cfg, nil
}

// proxySpec reads what Envoy is told of itself.
func (o object) proxySpec(cfg *Config) {
	spec := o.object("proxy-spec")
	if port, ok := spec.port("proxy-port", 1025); ok {
		if slices.Contains([]uint16{EnvoyAdminPort, InboundPort, AgentPort}, port) {
			spec.fail("proxy-port",
				fmt.Sprintf("%d is used by Envoy's admin interface, its inbound listener or the agent", port))
		}
		cfg.ProxyPort = port
	}
	switch v, given := spec.given("tracing"); {
	case !given:
	case v == "ON":
		cfg.Tracing = true
	case v != "OFF":
		spec.fail("tracing", `want "ON" or "OFF"`)
	}
	cfg.AccessLog = spec.accessLog("access-log")
	cfg.Network = spec.name("network")
	cfg.Scope = spec.name("scope")
	cfg.Mesh = spec.name("mesh")
	cfg.ProjectNumber = spec.digits("project-number")
	cfg.PrimarySource = spec.source("primary-source")
	cfg.SecondarySource = spec.source("secondary-source")
	if n, ok := spec.number("xds-version", 2, 3); ok && n == 2 {
		cfg.Warnings = append(
			cfg.Warnings, "proxy-spec.xds-version: version 2 is gone from Envoy since 1.18; 3 is used")
	}
	spec.rest()
}

// isAnthos tells the Anthos form: captured from gcloud with --mesh (testdata/asm-managed.attr),
// it has no api-version.
func isAnthos(fields map[string]any) bool {
	if _, ok := fields["asm-config"]; ok {
		return true
	}
	_, versioned := fields["api-version"]
	_, mode := fields["mode"]
	return mode && !versioned
}

// syntaxReason is the decoder's error with the byte where it was met, without any of the text.
func syntaxReason(text []byte, err error) string {
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		return fmt.Sprintf("%v, at byte %d", syntax, syntax.Offset)
	case len(bytes.TrimSpace(text)) == 0:
		return "the text is empty"
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Sprintf("the text ends early, at byte %d", len(text))
	}
	return err.Error()
}

// reader keeps the first error and the unknown keys, so that Parse reads as a list of keys.
type reader struct {
	err     *KeyError
	unknown []string
}

// object is one JSON object of the attribute. Each method takes its key out of fields; what is
// left over is unknown.
type object struct {
	r      *reader
	path   string
	fields map[string]any
}

func (o object) key(key string) string {
	if o.path == "" {
		return key
	}
	return o.path + "." + key
}

func (o object) fail(key, reason string) {
	if o.r.err == nil {
		o.r.err = &KeyError{o.key(key), reason}
	}
}

func (o object) take(key string) (any, bool) {
	v, ok := o.fields[key]
	delete(o.fields, key)
	return v, ok
}

func (o object) ignore(key string) { delete(o.fields, key) }

// rest notes what no method took. Names are cut: they are logged, and come from people.
func (o object) rest() {
	for key := range o.fields {
		if len(key) > 64 || !isPlain(key) {
			key = strconv.QuoteToASCII(key[:min(len(key), 64)])
		}
		o.r.unknown = append(o.r.unknown, o.key(key))
	}
}

func (o object) object(key string) object {
	sub := object{r: o.r, path: o.key(key)}
	v, ok := o.take(key)
	if !ok {
		return sub
	}
	if sub.fields, ok = v.(map[string]any); !ok {
		o.fail(key, "want an object, have "+typeName(v))
	}
	return sub
}

func (o object) given(key string) (string, bool) {
	v, ok := o.take(key)
	if !ok {
		return "", false
	}
	s, ok := v.(string)
	if !ok {
		o.fail(key, "want a string, have "+typeName(v))
		return "", false
	}
	return s, true
}

func (o object) text(key string) string {
	s, _ := o.given(key)
	return s
}

func (o object) flag(key string) bool {
	v, ok := o.take(key)
	if !ok {
		return false
	}
	b, ok := v.(bool)
	if !ok {
		o.fail(key, "want true or false, have "+typeName(v))
	}
	return b
}

func (o object) list(key string) []any {
	v, ok := o.take(key)
	if !ok {
		return nil
	}
	l, ok := v.([]any)
	if !ok {
		o.fail(key, "want a list, have "+typeName(v))
	}
	return l
}

func (o object) number(key string, low, high int) (int, bool) {
	v, ok := o.take(key)
	if !ok {
		return 0, false
	}
	n, reason := number(v, low, high)
	if reason != "" {
		o.fail(key, reason)
		return 0, false
	}
	return n, true
}

func (o object) port(key string, low int) (uint16, bool) {
	n, ok := o.number(key, low, 65535)
	return uint16(n), ok
}

func number(v any, low, high int) (n int, reason string) {
	num, ok := v.(json.Number)
	if !ok {
		return 0, "want a whole number, have " + typeName(v)
	}
	n, err := strconv.Atoi(num.String())
	if err != nil || n < low || n > high {
		return 0, fmt.Sprintf("want a whole number from %d to %d, have %.20s", low, high, num.String())
	}
	return n, ""
}

func (o object) servingPorts(key string, proxyPort uint16) []uint16 {
	var ports []uint16
	for i, v := range o.list(key) {
		item := fmt.Sprintf("%s[%d]", key, i)
		n, reason := number(v, 1, 65535)
		if reason != "" {
			o.fail(item, reason)
			continue
		}
		port := uint16(n)
		if port == proxyPort || slices.Contains(OwnPorts(), port) {
			o.fail(item, fmt.Sprintf(
				"%d is a port of Envoy or the agent (%d, %d, %d, %d), which cannot be a serving port",
				port, EnvoyAdminPort, proxyPort, InboundPort, AgentPort))
			continue
		}
		ports = append(ports, port)
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

func (o object) prefixes(key string) []netip.Prefix {
	var prefixes []netip.Prefix
	for i, v := range o.list(key) {
		item := fmt.Sprintf("%s[%d]", key, i)
		s, ok := v.(string)
		if !ok {
			o.fail(item, "want a string, have "+typeName(v))
			continue
		}
		p, err := parsePrefix(s)
		if err != nil {
			o.fail(item, fmt.Sprintf("want an IP address or CIDR range, have %s", quote(s)))
			continue
		}
		prefixes = append(prefixes, p)
	}
	return prefixes
}

func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" {
			return netip.Prefix{}, errors.New("not an address")
		}
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, err
	}
	// ::ffff:192.0.2.0/120 is 192.0.2.0/24 to whom wrote it; iptables has no such thing in IPv6
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, errors.New("not a range of either family")
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

func (o object) portRanges(key string) []PortRange {
	var ranges []PortRange
	for i, v := range o.list(key) {
		item := fmt.Sprintf("%s[%d]", key, i)
		s, ok := v.(string)
		if !ok {
			o.fail(item, "want a string, have "+typeName(v))
			continue
		}
		r, ok := parsePortRange(s)
		if !ok {
			o.fail(item, fmt.Sprintf("want a port or FIRST-LAST from 1 to 65535, have %s", quote(s)))
			continue
		}
		ranges = append(ranges, r)
	}
	return ranges
}

func parsePortRange(s string) (PortRange, bool) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || b == 0 {
		return PortRange{}, false
	}
	return PortRange{uint16(min(a, b)), uint16(max(a, b))}, true
}

func (o object) texts(key string) map[string]string {
	v, ok := o.take(key)
	if !ok {
		return nil
	}
	m, ok := v.(map[string]any)
	if !ok {
		o.fail(key, "want an object, have "+typeName(v))
		return nil
	}
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	sort.Strings(names) // the first malformed label is always the same one
	texts := make(map[string]string, len(m))
	for _, name := range names {
		s, ok := m[name].(string)
		if !ok {
			o.fail(fmt.Sprintf("%s[%s]", key, quote(name)), "want a string, have "+typeName(m[name]))
		}
		texts[name] = s
	}
	return texts
}

// name reads a network, scope or mesh name. It becomes one element of Envoy's node id,
// projects/N/networks/NAME/nodes/ID, so a slash, a space or a control character in it would make
// another node of this VM.
func (o object) name(key string) string {
	s := o.text(key)
	for _, c := range s {
		if c == '/' || c > unicode.MaxASCII || !unicode.IsGraphic(c) || unicode.IsSpace(c) {
			o.fail(key, fmt.Sprintf("want a name without slashes, spaces and control characters, have %s",
				quote(s)))
			return ""
		}
	}
	if len(s) > 255 {
		o.fail(key, fmt.Sprintf("want a name of at most 255 characters, have %d", len(s)))
		return ""
	}
	return s
}

func (o object) digits(key string) string {
	s := o.text(key)
	if strings.Trim(s, "0123456789") != "" || len(s) > 20 {
		o.fail(key, fmt.Sprintf("want a project's number in digits, have %s", quote(s)))
		return ""
	}
	return s
}

// accessLog reads a path that ends up in Envoy's configuration by way of the control plane, and
// its folder in a unit.
func (o object) accessLog(key string) string {
	s := o.text(key)
	switch {
	case s == "":
		return ""
	case !isPlain(s):
		o.fail(key, fmt.Sprintf("want a path without control characters, have %s", quote(s)))
	case !path.IsAbs(s) || path.Clean(s) != s || s == "/":
		o.fail(key, fmt.Sprintf("want the absolute path of a file, without . and .., have %s", quote(s)))
	case len(s) > 4095:
		o.fail(key, fmt.Sprintf("want a path of at most 4095 bytes, have %d", len(s)))
	default:
		return s
	}
	return ""
}

// source reads an archive's URL. The reason never quotes it: a signed URL's query is a secret.
func (o object) source(key string) string {
	s := o.text(key)
	if s == "" {
		return ""
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || !isPlain(s):
		o.fail(key, "want a gs://, https:// or file:// URL")
	case u.Scheme != "gs" && u.Scheme != "https" && u.Scheme != "file":
		o.fail(key, fmt.Sprintf("want a gs://, https:// or file:// URL, have scheme %s", quote(u.Scheme)))
	case u.Scheme == "file" && (u.Host != "" || u.Path == ""), u.Scheme != "file" && u.Host == "",
		strings.Trim(u.Path, "/") == "":
		o.fail(key, "the URL names no file")
	default:
		return s
	}
	return ""
}

// isPlain says that s holds no control characters and no broken UTF-8.
func isPlain(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool {
		return unicode.IsControl(c) || c == unicode.ReplacementChar || c == '\u2028' || c == '\u2029'
	})
}

// quote is s in quotes on one line, cut to a length that fits a guest attribute.
func quote(s string) string {
	const most = 64
	if r := []rune(s); len(r) > most {
		return strconv.QuoteToASCII(string(r[:most])) + "…"
	}
	return strconv.QuoteToASCII(s)
}

func typeName(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case bool:
		return "true or false"
	case json.Number:
		return "a number"
	case string:
		return "a string"
	case []any:
		return "a list"
	default:
		return "an object"
	}
}
