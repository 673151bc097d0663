package deployer

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/config"
)

// These are the files in a server's folder.
const (
	configFile    = "dendrite.yaml"
	authorityFile = "authority.pem"
	certFile      = "server.crt"
	keyFile       = "server.key"
	signingFile   = "matrix_key.pem"
)

type object = map[string]any

// configure writes a server's configuration, its keys, and the registrations of its application services. The YAML files contain JSON,
// which is valid YAML.
func configure(cfg *config.Complement, dir string, hs b.Homeserver) error {
	registrations, err := register(dir, hs.ApplicationServices)
	if err != nil {
		return err
	}
	database := func(name string) object {
		return object{"connection_string": "file:" + filepath.Join(dir, name+".db")}
	}
	err = writeJSON(filepath.Join(dir, configFile), object{
		"version": 2,
		"global": object{
			"server_name": hs.Name,
			"private_key": filepath.Join(dir, signingFile),
			"presence":    object{"enable_inbound": true, "enable_outbound": true},
			"jetstream":   object{"storage_path": filepath.Join(dir, "jetstream")},
			"server_notices": object{
				"enabled": true, "local_part": "_server", "display_name": "Server Alert", "room_name": "Server Alert",
			},
		},
		"app_service_api": object{"disable_tls_validation": true, "config_files": registrations},
		"client_api": object{
			"registration_disabled":      false,
			"registration_shared_secret": client.SharedSecret,
			"rate_limiting":              object{"enabled": false},
		},
		"federation_api": object{"database": database("federationapi"), "disable_http_keepalives": true},
		"key_server":     object{"database": database("keyserver")},
		"media_api": object{
			"database": database("mediaapi"), "base_path": filepath.Join(dir, "media"),
			"thumbnail_sizes": []object{
				{"width": 32, "height": 32, "method": "crop"},
				{"width": 96, "height": 96, "method": "crop"},
				{"width": 640, "height": 480, "method": "scale"},
			},
		},
		"mscs":        object{"database": database("mscs"), "mscs": []string{"msc2836", "msc2444", "msc2753"}},
		"relay_api":   object{"database": database("relayapi")},
		"room_server": object{"database": database("roomserver")},
		"sync_api": object{
			"database": database("syncapi"),
			"search":   object{"enabled": true, "in_memory": true, "index_path": filepath.Join(dir, "searchindex"), "language": "en"},
		},
		"user_api": object{"account_database": database("userapi"), "bcrypt_cost": 4},
		"logging":  []object{{"type": "std", "level": "debug"}},
	})
	if err != nil {
		return err
	}
	return writeKeys(cfg, dir, hs.Name)
}

// register writes the registrations of application services and returns the files. Each service may act as any user.
func register(dir string, services []b.ApplicationService) (files []string, err error) {
	for _, as := range services {
		file := filepath.Join(dir, url.PathEscape(as.ID)+".yaml")
		err = writeJSON(file, object{
			"id": as.ID, "hs_token": as.HSToken, "as_token": as.ASToken, "url": as.URL,
			"sender_localpart": as.SenderLocalpart, "rate_limited": as.RateLimited,
			"namespaces": object{"users": []object{{"exclusive": false, "regex": ".*"}}},
		})
		if err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// writeKeys writes a server's signing key, its TLS key and certificate, and the certificate of Complement's authority, which signed it.
func writeKeys(cfg *config.Complement, dir, host string) error {
	seed := make([]byte, ed25519.SeedSize)
	if _, err := rand.Read(seed); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	now := time.Now()
	certDER, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: now.Add(-time.Minute), NotAfter: now.AddDate(0, 0, 1), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, cfg.CACertificate, key.Public(), cfg.CAPrivateKey)
	if err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		signingFile:   {Type: "MATRIX PRIVATE KEY", Headers: map[string]string{"Key-ID": "ed25519:complement"}, Bytes: seed},
		keyFile:       {Type: "PRIVATE KEY", Bytes: keyDER},
		certFile:      {Type: "CERTIFICATE", Bytes: certDER},
		authorityFile: {Type: "CERTIFICATE", Bytes: cfg.CACertificate.Raw},
	} {
		if err = os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func writeJSON(name string, content object) error {
	data, err := json.MarshalIndent(content, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o600)
}
