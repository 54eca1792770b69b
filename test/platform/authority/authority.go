// Package authority is a certificate authority made on the fly for one test: it issues server
// certificates for names like trafficdirector.googleapis.com and storage.googleapis.com, and its
// PEM goes where the program under test looks for trusted authorities
// (/etc/ssl/certs/ca-certificates.crt in the box, a file of its own in the lab).
//
// It does not revoke, renew or store anything. The servers of test/controlplane and
// test/platform take what it issues.
package authority

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// life is how long certificates are valid: longer than any soak, short enough that a leaked
// one is worth nothing.
const life = 48 * time.Hour

// Authority signs certificates. Its methods may be called from several goroutines.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// New makes an authority with a fresh key.
func New() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate authority key: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: "service-proxy-agent test authority"},
		// An hour back, since the tests with a wrong clock step it.
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	cert, err := sign(template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	return &Authority{cert: cert, key: key}, nil
}

// PEM is the authority's own certificate, as a line of ca-certificates.crt.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// Pool is a pool that trusts this authority and no other.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// Certificate issues a certificate for host names and addresses, for servers and clients.
func (a *Authority) Certificate(hosts ...string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("generate key for %q: %w", hosts, err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(life),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	leaf, err := sign(template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign certificate for %q: %w", hosts, err)
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, a.cert.Raw}, PrivateKey: key, Leaf: leaf},
		nil
}

// Files issues a certificate and writes it into dir as name.crt, its key as name.key and the
// authority as ca.crt, each in one step.
func (a *Authority) Files(dir, name string, hosts ...string) (tls.Certificate, error) {
	cert, err := a.Certificate(hosts...)
	if err != nil {
		return cert, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return cert, err
	}
	for file, text := range map[string][]byte{
		"ca.crt":      a.PEM(),
		name + ".crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Leaf.Raw}),
		name + ".key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	} {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path+".new", text, 0o600); err != nil {
			return cert, err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return cert, err
		}
	}
	return cert, nil
}

func sign(template, parent *x509.Certificate, public *ecdsa.PublicKey,
	key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand does not fail on Linux (getrandom)
	}
	return n
}

// ClientConfig trusts this authority alone and checks the certificate against name.
func (a *Authority) ClientConfig(name string) *tls.Config {
	return &tls.Config{RootCAs: a.Pool(), ServerName: name}
}
