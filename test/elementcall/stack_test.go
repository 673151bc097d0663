//go:build all

package elementcall

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

// docs is the folder with the documents.
const docs = "../../docs"

// The secrets in the configuration files of docs/install.md and docs/element-call.md. The second is a placeholder that the homeserver refuses.
const (
	registrationSecret = "a-third-long-password"
	placeholder        = "change-me-change-me-change-me-change-me"
)

// stack has all that a call needs, on loopback: the homeserver, LiveKit and the reverse proxy, with the configuration files of
// docs/install.md and docs/element-call.md.
type stack struct {
	// dir has the output of all programs, and the screenshots.
	dir        string
	homeserver *homeserver.Server
	livekit    *program
	// https is the address of the reverse proxy. Browsers resolve all names of example.com to it.
	https string
	// replace are the values in the configuration files that are replaced, and their replacements.
	replace []string
}

// options are what makes a stack different.
type options struct {
	// openRegistration lets users without an account join by a link.
	openRegistration bool
	// noDelegation hides that the homeserver takes leave events, so that clients restart their own.
	noDelegation bool
}

// start starts a stack for one test.
func start(t *testing.T, o options) *stack {
	t.Helper()
	requirePrograms(t)
	s := &stack{dir: keptDir(t)}
	s.https = freeAddress(t)
	ports := map[string]string{}
	for _, port := range []string{"7880", "7881", "7882", "8008"} {
		_, ports[port], _ = net.SplitHostPort(freeAddress(t))
		s.replace = append(s.replace, port, ports[port])
	}
	s.replace = append(s.replace,
		"/etc/dendrite", s.dir, "/var/lib/dendrite", s.dir, "/var/www/element-call", s.pages(t), placeholder, rand.Text()+rand.Text(),
		"postgresql://dendrite:a-long-password@127.0.0.1/dendrite?sslmode=disable", postgres.NewDatabase(t),
		", example.com:8448", "", // no other server asks
		// Media use loopback.
		"use_external_ip: true", "node_ip: 127.0.0.1\n  enable_loopback_candidate: true\n  interfaces: {includes: [lo]}",
	)
	if o.openRegistration {
		s.replace = append(s.replace, "registration_disabled: true", "registration_disabled: false")
	}
	s.livekit = s.program(t, "livekit", programs.livekit, "--config", s.file(t, "livekit.yaml", "element-call/livekit.yaml"))
	s.startHomeserver(t, ports["8008"], o.noDelegation)
	s.startCaddy(t)
	s.requireWellKnown(t)
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

// file joins files of the documentation to one in the stack's folder, with the replacements, and returns its path.
func (s *stack) file(t *testing.T, name string, of ...string) string {
	t.Helper()
	var all strings.Builder
	for _, name := range of {
		text, err := os.ReadFile(filepath.Join(docs, name))
		require.NoError(t, err)
		_, _ = strings.NewReplacer(s.replace...).WriteString(&all, string(text)) // never fails
	}
	path := filepath.Join(s.dir, name)
	require.NoError(t, os.WriteFile(path, []byte(all.String()), 0o600))
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
	config, err := os.ReadFile(filepath.Join(docs, "element-call", "config.json"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o644))
	require.NoError(t, os.Symlink(filepath.Join(programs.elementCall, "assets"), filepath.Join(dir, "assets")))
	return dir
}

// startHomeserver starts the homeserver. It starts the trace in front of it, at the port that the reverse proxy and LiveKit use.
func (s *stack) startHomeserver(t *testing.T, port string, noDelegation bool) {
	t.Helper()
	config, err := os.ReadFile(s.file(t, "dendrite.yaml", "install/dendrite.yaml", "element-call/matrix_rtc.yaml"))
	require.NoError(t, err)
	s.homeserver, err = homeserver.NewConfigured(programs.homeserver, s.dir, "example.com", config)
	require.NoError(t, err)
	require.NoError(t, s.homeserver.Start(t.Context()))
	t.Cleanup(func() {
		if err := s.homeserver.Stop(); err != nil {
			t.Error(err)
		}
	})
	newTrace(t, s.homeserver.URL, "127.0.0.1:"+port, noDelegation)
}

// account makes an account, as an operator does.
func (s *stack) account(t *testing.T, name string) *homeserver.Client {
	t.Helper()
	user, err := homeserver.RegisterAt(t.Context(), s.homeserver.URL, registrationSecret, name)
	require.NoError(t, err)
	return user
}

// startCaddy starts the reverse proxy, with its own certificate authority instead of a public one.
func (s *stack) startCaddy(t *testing.T) {
	t.Helper()
	config, err := os.ReadFile(s.file(t, "Caddyfile", "install/Caddyfile", "element-call/Caddyfile", "element-call/pages.Caddyfile"))
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

// authority is the path of the authority's certificate, which signs those of the reverse proxy.
func (s *stack) authority() string { return s.dir + "/caddy/pki/authorities/local/root.crt" }

// requireWellKnown requires that the well-known file names the homeserver, and the service that gives out tokens.
func (s *stack) requireWellKnown(t *testing.T) {
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
	toProxy := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.https)
	}
	client := http.Client{Transport: &http.Transport{DialContext: toProxy, TLSClientConfig: &tls.Config{RootCAs: roots}}}
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
	require.JSONEq(t, `{
		"m.homeserver": {"base_url": "https://matrix.example.com"},
		"org.matrix.msc4143.rtc_foci": [{
			"type": "livekit",
			"livekit_service_url": "https://matrix.example.com/_matrix/client/unstable/io.element.msc4195/livekit"
		}]
	}`, string(answer))
}

// program is a program of the stack.
type program struct {
	path string
	args []string
	log  *os.File
	cmd  *exec.Cmd
}

// program runs a program of the stack until the test ends.
func (s *stack) program(t *testing.T, name, path string, args ...string) *program {
	t.Helper()
	log, err := os.Create(filepath.Join(s.dir, name+".log"))
	require.NoError(t, err)
	p := &program{path: path, args: args, log: log}
	p.start(t)
	t.Cleanup(func() {
		p.kill()
		_ = log.Close()
	})
	return p
}

// start runs the program, also after kill.
func (p *program) start(t *testing.T) {
	t.Helper()
	p.cmd = exec.Command(p.path, p.args...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	require.NoError(t, p.cmd.Start())
}

// kill ends the program at once. It may be called twice.
func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
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
