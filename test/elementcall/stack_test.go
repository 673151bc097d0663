//go:build all

package elementcall

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	neturl "net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// docs is the folder with the configuration files of docs/element-call.md.
const docs = "../../docs/element-call"

// secret is the registration secret in docs/element-call/dendrite.yaml.
const secret = "change-me-registration"

// stack has all services that a call needs, on loopback, with the configuration files of docs/element-call.
type stack struct {
	// dir has the output of all programs, and the screenshots.
	dir        string
	homeserver *homeserver.Server
	// https is the address of the reverse proxy. Browsers resolve all names of example.com to it.
	https string
	// env makes programs resolve these names to the reverse proxy, and trust its certificates.
	env []string
	// replace are the values in the configuration files that are replaced, and their replacements.
	replace []string
}

// options are the changes to the configuration files that an operator would make.
type options struct {
	// openRegistration lets users without an account join by a link.
	openRegistration bool
	// oldAuthService runs a token service that does not accept leave events.
	oldAuthService bool
}

// start starts a stack for one test.
func start(t *testing.T, o options) *stack {
	t.Helper()
	requirePrograms(t)
	s := &stack{dir: keptDir(t)}
	s.https = freeAddress(t)
	ports := map[string]string{}
	for _, port := range []string{"7880", "7881", "7882", "8008", "8080"} {
		_, ports[port], _ = net.SplitHostPort(freeAddress(t))
		s.replace = append(s.replace, port, ports[port])
	}
	s.replace = append(s.replace,
		"/etc/dendrite", s.dir, "/var/lib/dendrite", s.dir, "/var/www/element-call", s.pages(t),
		// Media use loopback.
		"use_external_ip: true", "node_ip: 127.0.0.1\n  enable_loopback_candidate: true\n  interfaces: {includes: [lo]}",
	)
	if o.openRegistration {
		s.replace = append(s.replace, "registration_disabled: true", "registration_disabled: false")
	}
	s.startHomeserver(t, ports["8008"])
	s.startCaddy(t)
	s.findNames(t)
	s.startAuthService(t, o.oldAuthService)
	s.program(t, "livekit", programs.livekit, "--config", s.file(t, "livekit.yaml"))
	for _, port := range []string{"7880", "8080"} {
		await(t, "port "+port, func() bool {
			conn, err := net.Dial("tcp", "127.0.0.1:"+ports[port])
			if err == nil {
				_ = conn.Close()
			}
			return err == nil
		})
	}
	return s
}

// keptDir returns a folder that is kept if the test fails. It is also kept if the environment variable KEEP_LOGS names a parent folder.
func keptDir(t *testing.T) string {
	t.Helper()
	keep := os.Getenv("KEEP_LOGS")
	dir, err := os.MkdirTemp(keep, t.Name()+"-")
	require.NoError(t, err)
	t.Cleanup(func() {
		if t.Failed() || keep != "" {
			t.Logf("logs and screenshots: %s", dir)
		} else {
			_ = os.RemoveAll(dir)
		}
	})
	return dir
}

// freeAddress returns a loopback address with a port that is free at the moment, for TCP and for UDP.
func freeAddress(t *testing.T) string {
	t.Helper()
	for {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		udp, err := net.ListenPacket("udp", tcp.Addr().String())
		_ = tcp.Close()
		if err == nil {
			_ = udp.Close()
			return tcp.Addr().String()
		}
	}
}

// file copies a file of the documentation into the stack's folder, with the replacements, and returns its path.
func (s *stack) file(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(docs, name))
	require.NoError(t, err)
	path := filepath.Join(s.dir, name)
	require.NoError(t, os.WriteFile(path, []byte(strings.NewReplacer(s.replace...).Replace(string(text))), 0o600))
	return path
}

// pages makes Element Call a web site of its own, as docs/element-call.md describes.
func (s *stack) pages(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	index, err := os.ReadFile(filepath.Join(programs.elementCall, "index.html"))
	require.NoError(t, err)
	index = []byte(strings.Replace(string(index), "<head>", `<head><base href="/">`, 1))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.html"), index, 0o644))
	config, err := os.ReadFile(filepath.Join(docs, "config.json"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o644))
	require.NoError(t, os.Symlink(filepath.Join(programs.elementCall, "assets"), filepath.Join(dir, "assets")))
	return dir
}

// startHomeserver starts the homeserver. It starts the trace in front of it, at the port that the reverse proxy uses.
func (s *stack) startHomeserver(t *testing.T, port string) {
	t.Helper()
	config, err := os.ReadFile(s.file(t, "dendrite.yaml"))
	require.NoError(t, err)
	s.homeserver, err = homeserver.NewConfigured(programs.homeserver, s.dir, "example.com", config)
	require.NoError(t, err)
	require.NoError(t, s.homeserver.Start(t.Context()))
	t.Cleanup(func() {
		if err := s.homeserver.Stop(); err != nil {
			t.Error(err)
		}
	})
	newTrace(t, s.homeserver.URL, "127.0.0.1:"+port)
}

// account makes an account, as an operator does.
func (s *stack) account(t *testing.T, name string) *homeserver.Client {
	t.Helper()
	user, err := homeserver.RegisterAt(t.Context(), s.homeserver.URL, secret, name)
	require.NoError(t, err)
	return user
}

// startCaddy starts the reverse proxy, with its own certificate authority instead of a public one.
func (s *stack) startCaddy(t *testing.T) {
	t.Helper()
	config, err := os.ReadFile(s.file(t, "Caddyfile"))
	require.NoError(t, err)
	host, port, err := net.SplitHostPort(s.https)
	require.NoError(t, err)
	const options = "\n{\n\tservers {\n"
	require.Contains(t, string(config), options)
	own := fmt.Sprintf("\n{\n\tadmin off\n\tauto_https disable_redirects\n\tlocal_certs\n\tskip_install_trust\n"+
		"\tstorage file_system %s\n\tdefault_bind %s\n\thttps_port %s\n\tservers {\n\t\tprotocols h1 h2\n", s.dir+"/caddy", host, port)
	path := filepath.Join(s.dir, "Caddyfile")
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(string(config), options, own, 1)), 0o600))
	s.program(t, "caddy", "caddy", "run", "--adapter", "caddyfile", "--config", path)
}

// findNames starts a proxy that connects requests for names of example.com to the reverse proxy, and refuses all others.
func (s *stack) findNames(t *testing.T) {
	t.Helper()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || !strings.HasSuffix(r.URL.Hostname(), "example.com") {
			http.Error(w, "not here", http.StatusForbidden)
			return
		}
		there, err := net.Dial("tcp", s.https)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		here, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			_ = there.Close()
			return
		}
		_, _ = io.WriteString(here, "HTTP/1.1 200 OK\r\n\r\n")
		for _, pair := range [][2]net.Conn{{here, there}, {there, here}} {
			go func() {
				_, _ = io.Copy(pair[0], pair[1])
				_, _ = pair[0].Close(), pair[1].Close()
			}()
		}
	}))
	t.Cleanup(proxy.Close)
	s.env = []string{"HTTPS_PROXY=" + proxy.URL, "SSL_CERT_FILE=" + s.authority()}
	s.requireWellKnown(t, proxy.URL)
}

// authority is the path of the authority's certificate, which signs those of the reverse proxy.
func (s *stack) authority() string { return s.dir + "/caddy/pki/authorities/local/root.crt" }

// requireWellKnown requires that the well-known files have the contents that docs/element-call.md describes.
func (s *stack) requireWellKnown(t *testing.T, proxy string) {
	t.Helper()
	const url = "https://example.com/.well-known/matrix/client"
	var certificate []byte
	await(t, "the reverse proxy's certificate", func() (there bool) {
		var err error
		certificate, err = os.ReadFile(s.authority())
		return err == nil && len(certificate) > 0
	})
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(certificate))
	through := func(*http.Request) (*neturl.URL, error) { return neturl.Parse(proxy) }
	client := http.Client{Transport: &http.Transport{Proxy: through, TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	var answer []byte
	await(t, url, func() bool {
		res, err := client.Get(url)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		answer, err = io.ReadAll(res.Body)
		return err == nil && res.StatusCode == http.StatusOK
	})
	shown, err := os.ReadFile(filepath.Join(docs, "well-known-client.json"))
	require.NoError(t, err)
	require.JSONEq(t, string(shown), string(answer))
}

// startAuthService starts the token service.
func (s *stack) startAuthService(t *testing.T, old bool) {
	t.Helper()
	settings, err := os.ReadFile(s.file(t, "lk-jwt-service.env"))
	require.NoError(t, err)
	for line := range strings.Lines(string(settings)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			s.env = append(s.env, line)
		}
	}
	if old {
		s.env = append(s.env, "DELEGATION=off")
	}
	s.program(t, "authservice", programs.auth)
}

// program runs a program of the stack until the test ends.
func (s *stack) program(t *testing.T, name, path string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(s.dir, name+".log"))
	require.NoError(t, err)
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, append(os.Environ(), s.env...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
	})
}

// await returns when a condition is true.
func await(t *testing.T, what string, isSo func() bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); !isSo(); time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			t.Fatalf("did not come: %s", what)
		}
	}
}

const pollInterval = 20 * time.Millisecond
