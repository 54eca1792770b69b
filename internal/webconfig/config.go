package webconfig

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/crypto/bcrypt"
)

// config is the file as it is written.
type config struct {
	TLS       *tlsServer      `yaml:"tls_server_config"` // nil: plain HTTP
	HTTP      httpServer      `yaml:"http_server_config"`
	RateLimit rateLimit       `yaml:"rate_limit"`
	Users     map[string]hash `yaml:"basic_auth_users"` // none: everybody may ask
}

type tlsServer struct {
	Cert         string           `yaml:"cert"`
	Key          string           `yaml:"key"`
	ClientCA     string           `yaml:"client_ca"`
	CertFile     string           `yaml:"cert_file"`
	KeyFile      string           `yaml:"key_file"`
	ClientCAFile string           `yaml:"client_ca_file"`
	ClientAuth   named[tlsClient] `yaml:"client_auth_type"`
	AllowedSANs  []string         `yaml:"client_allowed_sans"`
	Ciphers      []named[cipher]  `yaml:"cipher_suites"`
	Curves       []named[curve]   `yaml:"curve_preferences"`
	MinVersion   named[version]   `yaml:"min_version"`
	MaxVersion   named[version]   `yaml:"max_version"`
	// Go chooses the suite itself.
	PreferServer bool `yaml:"prefer_server_cipher_suites"`
}

type httpServer struct {
	HTTP2   *bool             `yaml:"http2"` // nil: true
	Headers map[string]string `yaml:"headers"`
}

type rateLimit struct {
	Burst    int      `yaml:"burst"`
	Interval interval `yaml:"interval"` // between two requests; 0: no limit
}

// What the format names, and Go has numbers for.
type (
	tlsClient = tls.ClientAuthType
	cipher    uint16
	curve     = tls.CurveID
	version   uint16
)

var (
	clientAuthTypes = map[string]tlsClient{
		"NoClientCert": tls.NoClientCert, "RequestClientCert": tls.RequestClientCert,
		"RequireAnyClientCert":       tls.RequireAnyClientCert,
		"RequireClientCert":          tls.RequireAnyClientCert, // its former name
		"VerifyClientCertIfGiven":    tls.VerifyClientCertIfGiven,
		"RequireAndVerifyClientCert": tls.RequireAndVerifyClientCert,
	}
	curves = map[string]curve{"CurveP256": tls.CurveP256, "CurveP384": tls.CurveP384,
		"CurveP521": tls.CurveP521, "X25519": tls.X25519}
	versions = map[string]version{"TLS10": tls.VersionTLS10, "TLS11": tls.VersionTLS11,
		"TLS12": tls.VersionTLS12, "TLS13": tls.VersionTLS13}
)

// named is a value that the file gives by its name.
type named[T tlsClient | cipher | curve | version] struct{ value T }

func (n *named[T]) UnmarshalYAML(node *yaml.Node) error {
	var known map[string]T
	what := ""
	switch all := any(&known).(type) {
	case *map[string]tlsClient:
		*all, what = clientAuthTypes, "client_auth_type"
	case *map[string]curve:
		*all, what = curves, "curve"
	case *map[string]version:
		*all, what = versions, "TLS version"
	case *map[string]cipher:
		*all, what = map[string]cipher{}, "cipher suite"
		for _, suite := range tls.CipherSuites() { // the secure ones
			(*all)[suite.Name] = cipher(suite.ID)
		}
	}
	value, ok := known[node.Value]
	if !ok {
		names := "those of Go's crypto/tls"
		if len(known) < 10 {
			names = strings.Join(slices.Sorted(maps.Keys(known)), ", ")
		}
		return fmt.Errorf("line %d: unknown %s %q; use one of %s", node.Line, what, node.Value, names)
	}
	n.value = value
	return nil
}

// interval is a time like 1s, which the YAML package would not take 0 for.
type interval time.Duration

func (i *interval) UnmarshalYAML(node *yaml.Node) error {
	d, err := time.ParseDuration(node.Value)
	if err != nil || d < 0 {
		return fmt.Errorf("line %d: rate_limit.interval is %q; use a time like 1s, or 0 for no limit",
			node.Line, node.Value)
	}
	*i = interval(d)
	return nil
}

// maxCost bounds what a single log-in costs: a second of processor. Each step doubles it.
const maxCost = 14

// hash is bcrypt's of a password. No error tells it.
type hash string

func (h *hash) UnmarshalYAML(node *yaml.Node) error {
	cost, err := bcrypt.Cost([]byte(node.Value))
	switch {
	case err != nil:
		return fmt.Errorf("line %d: basic_auth_users wants bcrypt hashes of passwords; make one with "+
			"`htpasswd -nBC 10 NAME`", node.Line)
	case cost > maxCost:
		return fmt.Errorf("line %d: a hash in basic_auth_users has cost %d, which takes seconds of the "+
			"VM's processor; make one with `htpasswd -nBC 10 NAME`, at most %d", node.Line, cost, maxCost)
	}
	*h = hash(node.Value)
	return nil
}

// parse reads the text of a file, and checks all that needs no other file.
func parse(text []byte) (config, error) {
	var c config
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return config{}, inWords(err)
	}
	if c.TLS == nil && len(c.Users) == 0 && c.HTTP.HTTP2 == nil && c.HTTP.Headers == nil &&
		c.RateLimit == (rateLimit{}) {
		// A file in the middle of being written must not open what it protects.
		return config{}, errors.New("it sets nothing; without TLS and users leave the flag out")
	}
	if c.RateLimit.Interval > 0 && c.RateLimit.Burst < 1 {
		return config{}, errors.New("rate_limit.burst is below 1, which lets nobody in")
	}
	if err := c.HTTP.check(); err != nil {
		return config{}, err
	}
	if c.TLS != nil {
		if err := c.TLS.check(c.HTTP); err != nil {
			return config{}, err
		}
	}
	return c, nil
}

// headers are those that the format lets a file set, with the values it may give; nil: any.
var headers = map[string][]string{
	"Strict-Transport-Security": nil, "X-Content-Type-Options": {"nosniff"},
	"X-Frame-Options": {"deny", "sameorigin"}, "X-XSS-Protection": nil,
	"Content-Security-Policy": nil,
}

func (h httpServer) check() error {
	for _, name := range slices.Sorted(maps.Keys(h.Headers)) {
		values, known := headers[name]
		if !known {
			return fmt.Errorf("http_server_config.headers cannot set %q; it takes %s", name,
				strings.Join(slices.Sorted(maps.Keys(headers)), ", "))
		}
		if values != nil && !slices.Contains(values, h.Headers[name]) {
			return fmt.Errorf("http_server_config.headers: %s is %q; use %s", name, h.Headers[name],
				strings.Join(values, " or "))
		}
	}
	return nil
}

func (h httpServer) http2() bool { return h.HTTP2 == nil || *h.HTTP2 }

func (t *tlsServer) check(h httpServer) error {
	for _, pair := range []struct {
		name, text, file string
		needed           bool
	}{
		{"cert", t.Cert, t.CertFile, true}, {"key", t.Key, t.KeyFile, true},
		{"client_ca", t.ClientCA, t.ClientCAFile, false},
	} {
		switch {
		case pair.text != "" && pair.file != "":
			return fmt.Errorf("tls_server_config has both %s and %[1]s_file; use one", pair.name)
		case pair.needed && pair.text == "" && pair.file == "":
			return fmt.Errorf("tls_server_config has neither %s nor %[1]s_file", pair.name)
		}
	}
	auth, ca := t.ClientAuth.value, t.ClientCA != "" || t.ClientCAFile != ""
	switch {
	case auth == tls.RequestClientCert, auth == tls.RequireAnyClientCert:
		// Whoever can make a certificate has one; a client CA besides is never asked.
		return errors.New("tls_server_config.client_auth_type lets every certificate in; use " +
			"RequireAndVerifyClientCert with client_ca_file")
	case ca && auth == tls.NoClientCert:
		return errors.New("tls_server_config has a client CA and no client_auth_type; use " +
			"RequireAndVerifyClientCert")
	case !ca && auth == tls.RequireAndVerifyClientCert:
		// Go would take the VM's own roots: everybody whom a public authority gave a certificate.
		return errors.New("tls_server_config.client_auth_type RequireAndVerifyClientCert needs " +
			"client_ca_file")
	case len(t.AllowedSANs) > 0 && auth != tls.RequireAndVerifyClientCert:
		return errors.New("tls_server_config.client_allowed_sans needs client_auth_type " +
			"RequireAndVerifyClientCert: other names are not checked")
	}
	// RFC 7540, 9.2.2: HTTP/2 over TLS 1.2 needs this suite, of either kind of key.
	if h.http2() && len(t.Ciphers) > 0 && t.MinVersion.value != tls.VersionTLS13 &&
		!slices.ContainsFunc(t.Ciphers, func(c named[cipher]) bool {
			return uint16(c.value) == tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 ||
				uint16(c.value) == tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
		}) {
		return errors.New("tls_server_config.cipher_suites lacks the suite that HTTP/2 needs; add " +
			"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 or its ECDSA twin, or set http2: false")
	}
	return nil
}

var (
	unknownRE  = regexp.MustCompile(`field (\S+) not found in type webconfig\.(\w+)`)
	mismatchRE = regexp.MustCompile("(?s)cannot unmarshal !!(\\w+)(?: `.*`)? into (\\S+)")
	sections   = map[string]string{"config": "", "tlsServer": " in tls_server_config",
		"httpServer": " in http_server_config", "rateLimit": " in rate_limit"}
)

// inWords is an error of the YAML package in the words of the file, and without its values: they
// may be secrets.
func inWords(err error) error {
	lines := []string{strings.TrimPrefix(err.Error(), "yaml: ")}
	var several *yaml.TypeError
	if errors.As(err, &several) {
		lines = several.Errors
	}
	for i, line := range lines {
		if m := unknownRE.FindStringSubmatch(line); m != nil {
			line = strings.Replace(line, m[0], fmt.Sprintf("unknown key %q%s", m[1], sections[m[2]]), 1)
		}
		if m := mismatchRE.FindStringSubmatch(line); m != nil {
			want := "a " + m[2]
			if strings.HasPrefix(m[2], "webconfig.") || strings.HasPrefix(m[2], "map[") {
				want = "keys and values"
			}
			line = strings.Replace(line, m[0], fmt.Sprintf("want %s, have a %s", want, m[1]), 1)
		}
		lines[i] = line
	}
	return errors.New(strings.Join(lines, "; "))
}
