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

// Federation makes a server federate. The server listens with TLS on a loopback address, which is also its name, so that other servers
// find it without DNS. Servers of one Authority trust one another, and no other server.
type Federation struct {
	// Host is an IP address of loopback that no other server of the test has.
	Host string
	// Authority signs the certificates of this server and of the servers that it talks to.
	Authority *Authority
	// Gate is a proxy for the requests of other servers. It listens at the server's name, and its host must be Host. If it is nil, the server
	// listens there itself.
	Gate *Gate
}

// Authority is a certificate authority for a test.
type Authority struct {
	dir         string
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

// validity is how long certificates are valid. It is longer than any test runs.
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

// emptyDir is an empty folder of certificates.
func (a *Authority) emptyDir() string { return filepath.Join(a.dir, "no-certificates") }

// env returns the environment in which a process trusts the authority, and no other.
func (a *Authority) env() []string {
	return []string{"SSL_CERT_FILE=" + a.file(), "SSL_CERT_DIR=" + a.emptyDir()}
}

// issue writes a key, and a certificate for an IP address. A DNS name is not needed, because servers use the address.
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
