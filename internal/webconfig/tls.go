package webconfig

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// pems are the certificate, its key and the clients' authority, as text.
type pems [3]string

// serverConfig makes crypto/tls's settings.
func (t *tlsServer) serverConfig(p pems, h httpServer) (*tls.Config, error) {
	cert, err := tls.X509KeyPair([]byte(p[0]), []byte(p[1]))
	if err != nil {
		return nil, fmt.Errorf("tls_server_config: the certificate and its key: %w", err)
	}
	c := &tls.Config{
		Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12,
		MaxVersion: tls.VersionTLS13, ClientAuth: t.ClientAuth.value,
		NextProtos: []string{"http/1.1"},
		// A ticket would let a client in after its authority has gone from the file.
		SessionTicketsDisabled: true,
	}
	if h.http2() {
		c.NextProtos = []string{"h2", "http/1.1"}
	}
	if v := t.MinVersion.value; v != 0 {
		c.MinVersion = uint16(v)
	}
	if v := t.MaxVersion.value; v != 0 {
		c.MaxVersion = uint16(v)
	}
	if c.MinVersion > c.MaxVersion {
		return nil, errors.New("tls_server_config.min_version is above max_version")
	}
	for _, suite := range t.Ciphers {
		c.CipherSuites = append(c.CipherSuites, uint16(suite.value))
	}
	for _, curve := range t.Curves {
		c.CurvePreferences = append(c.CurvePreferences, curve.value)
	}
	if p[2] != "" {
		c.ClientCAs = x509.NewCertPool()
		if !c.ClientCAs.AppendCertsFromPEM([]byte(p[2])) {
			return nil, errors.New("tls_server_config: the client CA has no PEM certificate")
		}
	}
	if len(t.AllowedSANs) > 0 {
		c.VerifyConnection = t.allowed
	}
	return c, nil
}

// allowed lets those in whose certificate, which is verified, has one of the names.
func (t *tlsServer) allowed(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("no client certificate")
	}
	cert := state.PeerCertificates[0]
	names := slices.Concat(cert.DNSNames, cert.EmailAddresses)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	for _, uri := range cert.URIs {
		names = append(names, uri.String())
	}
	for _, name := range names {
		if slices.Contains(t.AllowedSANs, name) {
			return nil
		}
	}
	return fmt.Errorf("none of the client's names %q is in client_allowed_sans", names)
}
