// Package authorities finds the certificates of the authorities that this VM trusts. It is for
// programs that were started before somebody installed or changed them: Go reads the system's once
// in a process's life.
package authorities

import (
	"bufio"
	"crypto/x509"
	"os"
	"path/filepath"
)

// Files are where distributions keep the bundle.
var Files = []string{
	"/etc/ssl/certs/ca-certificates.crt", // Debian, and SUSE of today
	"/etc/pki/tls/certs/ca-bundle.crt",   // Red Hat
	"/etc/ssl/ca-bundle.pem",             // SUSE of old
}

// File is the VM's bundle, one of [Files], "" where there is none. The VM's root is at root; "" is
// this machine's.
func File(root string) string {
	for _, name := range Files {
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			continue
		}
		// An interrupted update-ca-certificates can leave it empty.
		_, err = bufio.NewReader(f).Peek(1)
		f.Close()
		if err == nil {
			return name
		}
	}
	return ""
}

// Pool is what [File] holds now, nil (Go's own idea of the system's) where there is none. It fails
// if the file cannot be read.
func Pool(root string) (*x509.CertPool, error) {
	name := File(root)
	if name == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	return pool, nil
}
