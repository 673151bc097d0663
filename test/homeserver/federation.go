package homeserver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Federation makes a server federate. It listens with TLS on an address of loopback, and that address is its name, so that
// others find it without DNS. Servers of one Authority trust one another and nobody else.
type Federation struct {
	// Host is an IP address of loopback, which no other server of the test has.
	Host string
	// Authority signs the server's certificate, and those of the servers that it talks to.
	Authority *Authority
	// Gate is what other servers find at the server's name, and leads to the server; nil means the server itself. Its host is Host.
	Gate *Gate
}

// Authority is a certificate authority that is made for a test.
type Authority struct {
	dir         string
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

// validity is how long certificates are valid: longer than any test runs.
const validity = 24 * time.Hour

// NewAuthority makes an authority, and writes its certificate into dir.
func NewAuthority(dir string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := newTemplate("the authority of a test")
	template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	a := &Authority{dir: dir, key: key}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if err = os.Mkdir(a.emptyDir(), 0o700); err != nil {
		return nil, err
	}
	return a, writePEM(a.file(), "CERTIFICATE", der)
}

func (a *Authority) file() string { return filepath.Join(a.dir, "authority.pem") }

// emptyDir is a folder without certificates.
func (a *Authority) emptyDir() string { return filepath.Join(a.dir, "no-certificates") }

// env makes a process trust the authority, and nobody else.
func (a *Authority) env() []string {
	return []string{"SSL_CERT_FILE=" + a.file(), "SSL_CERT_DIR=" + a.emptyDir()}
}

// issue writes a key, and a certificate for an IP address: one in DNS would not be needed, nor looked at.
func (a *Authority) issue(host, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := newTemplate(host)
	template.IPAddresses = []net.IP{net.ParseIP(host)}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err = writePEM(certFile, "CERTIFICATE", der); err != nil {
		return err
	}
	return writePEM(keyFile, "PRIVATE KEY", private)
}

func newTemplate(name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(validity), BasicConstraintsValid: true,
	}
}

func writePEM(name, kind string, data []byte) error {
	return os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600)
}
