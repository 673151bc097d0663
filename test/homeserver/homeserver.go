// Package homeserver builds the homeserver's real binary, runs it in a throw-away folder, and talks to it over HTTP.
//
// The integration tests and the demo use it to start servers. A server listens only on loopback. After Stop or Kill its folder can be
// served again, as after a restart or a crash.
package homeserver

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"gopkg.in/yaml.v2"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// pkg is the import path of the homeserver's command.
const pkg = "github.com/matrix-org/dendrite/setup/mscs/msc4140/cmd/dendrite"

// These limits are for an idle machine, see package patience.
const (
	startTimeout = 60 * time.Second
	stopTimeout  = 30 * time.Second
	pollInterval = 10 * time.Millisecond
)

// SharedSecret is the registration secret of every server that this package configures.
const SharedSecret = "only-for-tests"

// Password is the password of every account that this package makes.
const Password = "only-for-tests"

// Tree is the name of an environment variable. Its value is a Dendrite source tree whose own command is built instead of ours. The tree
// must already have our extension, see package patches.
const Tree = "DENDRITE_TREE"

// Build compiles the homeserver into dir, with the given flags of go build, and returns the binary's path.
func Build(ctx context.Context, dir string, flags ...string) (string, error) {
	binary := filepath.Join(dir, "dendrite")
	if runtime.GOOS == "windows" {
		binary += ".exe"
	}
	build := exec.CommandContext(ctx, "go", append([]string{"build", "-o", binary}, flags...)...)
	if tree := os.Getenv(Tree); tree == "" {
		build.Args = append(build.Args, pkg)
	} else {
		build.Dir, build.Args = tree, append(build.Args, "./cmd/dendrite")
	}
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the homeserver: %w\n%s", err, out)
	}
	return binary, nil
}

// Config is the configuration of a server.
type Config struct {
	// Postgres is the connection string of an empty database, or "" for SQLite files in the server's folder.
	Postgres string
	// Expiration is the section expiration of dendrite.yaml, without the database; nil leaves it out.
	Expiration map[string]any
	// MatrixRTC is the section matrix_rtc; nil leaves it out.
	MatrixRTC map[string]any
	// WellKnown makes the server publish its URL in /.well-known/matrix/client.
	WellKnown bool
	// ExpirationDatabase is the connection string of a separate database for the timers; "" means the default.
	ExpirationDatabase string
	// Search makes the server index messages for /search.
	Search bool
	// MSCs are the MSCs of Dendrite's own that are enabled, such as "msc2836".
	MSCs []string
	// AppServices are the paths of registration files.
	AppServices []string
	// TraceHTTP makes Dendrite log whole requests.
	TraceHTTP bool
	// LogLevel is the lowest level that is logged; "" means every level.
	LogLevel string
	// Federation makes the server federate; nil means that it does not.
	Federation *Federation
	// Jaeger is the UDP address of an agent that gets the traces of all requests; "" means none.
	Jaeger string
}

// Server is one homeserver in one folder.
type Server struct {
	// URL is the server's address for clients, "http://127.0.0.1:PORT".
	URL string
	// Name is its server name. It is "localhost", or the address at which other servers find it if it federates.
	Name string
	// Dir has its configuration, key, databases, log and output.
	Dir string

	binary string
	args   []string
	env    []string
	cmd    *exec.Cmd
	exited chan struct{}
}

// New writes the key and the configuration into dir. It returns a server that does not run yet.
func New(binary, dir string, cfg Config) (*Server, error) {
	s := &Server{Name: "localhost", Dir: dir, binary: binary}
	address, err := freeAddress(loopback)
	if err != nil {
		return nil, err
	}
	s.URL = "http://" + address
	s.args = []string{"--config", s.path("dendrite.yaml"), "--http-bind-address", address}
	if cfg.Federation != nil {
		if err = s.federate(cfg.Federation); err != nil {
			return nil, err
		}
	}
	if err = writeKey(s.path("matrix_key.pem")); err != nil {
		return nil, err
	}
	if err = s.Configure(cfg); err != nil {
		return nil, err
	}
	if cfg.TraceHTTP {
		s.env = append(s.env, "DENDRITE_TRACE_HTTP=1")
	}
	s.env = append(s.env, failpoint.File+"="+s.path("failpoints"))
	return s, nil
}

// federate gives the server an address for other servers, and a certificate.
func (s *Server) federate(f *Federation) error {
	address, err := freeAddress(f.Host)
	if err != nil {
		return err
	}
	if s.Name = address; f.Gate != nil {
		s.Name = f.Gate.listener.Addr().String()
		f.Gate.forward(address)
	}
	certFile, keyFile := s.path("tls_cert.pem"), s.path("tls_key.pem")
	s.args = append(s.args, "--https-bind-address", address, "--tls-cert", certFile, "--tls-key", keyFile)
	s.env = append(s.env, f.Authority.env()...)
	return f.Authority.issue(f.Host, certFile, keyFile)
}

// NewInHome returns a server that makes its own data folder, because it has no configuration file.
func NewInHome(binary, dir string) (*Server, error) {
	address, err := freeAddress(loopback)
	if err != nil {
		return nil, err
	}
	return &Server{
		URL: "http://" + address, Name: "localhost", Dir: dir, binary: binary,
		args: []string{"--data", dir, "--http-bind-address", address},
	}, nil
}

// NewConfigured returns a server with the caller's configuration file. The server listens on loopback for clients and for other servers,
// as behind a reverse proxy. Its key is dir/matrix_key.pem.
func NewConfigured(binary, dir, name string, config []byte) (*Server, error) {
	address, err := freeAddress(loopback)
	if err != nil {
		return nil, err
	}
	s := &Server{URL: "http://" + address, Name: name, Dir: dir, binary: binary}
	s.args = []string{"--config", s.path("dendrite.yaml"), "--http-bind-address", address}
	if err = writeKey(s.path("matrix_key.pem")); err != nil {
		return nil, err
	}
	return s, os.WriteFile(s.path("dendrite.yaml"), config, 0o600)
}

// loopback is the address on which servers listen for clients.
const loopback = "127.0.0.1"

// freeAddress returns an address with a port that is free at the moment.
func freeAddress(host string) (string, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// writeKey writes a new signing key, so that each server has its own.
func writeKey(name string) error {
	seed := make([]byte, ed25519.SeedSize)
	if _, err := rand.Read(seed); err != nil {
		return err
	}
	return os.WriteFile(name, pem.EncodeToMemory(&pem.Block{
		Type: "MATRIX PRIVATE KEY", Headers: map[string]string{"Key-ID": "ed25519:test"}, Bytes: seed,
	}), 0o600)
}

// Seed returns the seed of the server's signing key.
func (s *Server) Seed() ([]byte, error) {
	data, err := os.ReadFile(s.path("matrix_key.pem"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("matrix_key.pem has no key")
	}
	return block.Bytes, nil
}

func (s *Server) path(name string) string { return filepath.Join(s.Dir, name) }

// Configure writes dendrite.yaml; it takes effect at the next Start.
func (s *Server) Configure(cfg Config) error {
	type m = map[string]any
	database := func(name string) m {
		if cfg.Postgres != "" {
			return m{}
		}
		return m{"connection_string": "file:" + s.path("dendrite_"+name+".db")}
	}
	root := m{
		"version": 2,
		"global": m{
			"server_name": s.Name, "private_key": s.path("matrix_key.pem"), "disable_federation": cfg.Federation == nil,
			"jetstream": m{"storage_path": s.path("jetstream")},
			"metrics":   m{"enabled": true},
		},
		"app_service_api": m{"config_files": cfg.AppServices},
		"client_api": m{
			"registration_disabled": false, "registration_shared_secret": SharedSecret, "guests_disabled": false,
			"rate_limiting": m{"enabled": false},
		},
		// Element's line denies loopback addresses by default, but the tests' servers have no others.
		"federation_api": m{"database": database("federationapi"), "deny_networks": []string{}},
		"key_server":     m{"database": database("keyserver")},
		"media_api":      m{"database": database("mediaapi"), "base_path": s.path("media")},
		"mscs":           m{"database": database("mscs"), "mscs": cfg.MSCs},
		"relay_api":      m{"database": database("relayapi")},
		"room_server":    m{"database": database("roomserver")},
		"sync_api":       m{"database": database("syncapi"), "search": m{"enabled": cfg.Search, "index_path": s.path("searchindex"), "language": "en"}},
		"user_api":       m{"account_database": database("userapi"), "bcrypt_cost": 4},
		"logging":        []m{{"type": "file", "level": cmp.Or(cfg.LogLevel, "trace"), "params": m{"path": s.path("log")}}},
	}
	if cfg.Postgres != "" {
		root["global"].(m)["database"] = m{"connection_string": cfg.Postgres, "max_open_conns": 40, "max_idle_conns": 40}
	}
	if cfg.Jaeger != "" {
		root["tracing"] = m{"enabled": true, "jaeger": m{
			"sampler": m{"type": "const", "param": 1}, "reporter": m{"localAgentHostPort": cfg.Jaeger},
		}}
	}
	if cfg.WellKnown {
		root["global"].(m)["well_known_client_name"] = s.URL
	}
	if cfg.MatrixRTC != nil {
		root["matrix_rtc"] = cfg.MatrixRTC
	}
	expiration := maps.Clone(cfg.Expiration)
	if cfg.ExpirationDatabase != "" {
		if expiration == nil {
			expiration = m{}
		}
		expiration["database"] = m{"connection_string": cfg.ExpirationDatabase}
	}
	if expiration != nil {
		root["expiration"] = expiration
	}
	data, err := yaml.Marshal(root)
	if err != nil {
		return err
	}
	return os.WriteFile(s.path("dendrite.yaml"), data, 0o600)
}

// Failpoints sets the failpoints of a server that is built with the tag "failpoints", see package failpoint. It replaces the earlier ones,
// also in a running server.
func (s *Server) Failpoints(lines ...string) error {
	next := s.path("failpoints.next")
	if err := os.WriteFile(next, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		return err
	}
	return os.Rename(next, s.path("failpoints"))
}

// ErrEnded is the error of Start if the process ended by itself.
var ErrEnded = errors.New("the homeserver ended at its start")

// Use makes the next Start run another binary on the folder.
func (s *Server) Use(binary string) { s.binary = binary }

// Ended returns a channel that is closed when the process of the last Start has ended.
func (s *Server) Ended() <-chan struct{} { return s.exited }

// Start starts the server and returns when it answers requests.
func (s *Server) Start(ctx context.Context) error {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return err
	}
	output, err := os.OpenFile(s.path("output"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer output.Close()
	// Guests and open registration need this flag, or a captcha.
	s.cmd = exec.Command(s.binary, append([]string{"--really-enable-open-registration"}, s.args...)...)
	s.cmd.Stdout, s.cmd.Stderr, s.cmd.Env = output, output, append(os.Environ(), s.env...)
	if err = s.cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	s.exited = exited
	go func() {
		_ = s.cmd.Wait()
		close(exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, patience.For(startTimeout))
	defer cancel()
	for {
		if res, err := http.Get(s.URL + "/_matrix/client/versions"); err == nil {
			_ = res.Body.Close()
			return nil
		}
		select {
		case <-s.exited:
			return fmt.Errorf("%w:\n%s", ErrEnded, s.tail())
		case <-ctx.Done():
			s.Kill()
			return fmt.Errorf("the homeserver did not come up:\n%s", s.tail())
		case <-time.After(pollInterval):
		}
	}
}

// tail returns the last lines of the server's output.
func (s *Server) tail() []byte {
	out, _ := os.ReadFile(s.path("output"))
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-10):], []byte("\n"))
}

// Pid returns the process ID of the running server.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Stop stops the server as an operator does, with SIGTERM.
func (s *Server) Stop() error {
	if s.cmd == nil {
		return nil
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.exited:
	case <-time.After(patience.For(stopTimeout)):
		s.Kill()
		return errors.New("the homeserver did not stop")
	}
	code := s.cmd.ProcessState.ExitCode()
	s.cmd = nil
	// Dendrite's own command stops everything at once, so a component that is writing panics.
	if code != 0 && os.Getenv(Tree) == "" {
		return fmt.Errorf("the homeserver ended with code %d:\n%s", code, s.tail())
	}
	return nil
}

// Kill ends the server with SIGKILL, as a crash does.
func (s *Server) Kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		<-s.exited
		s.cmd = nil
	}
}

// Written returns the server's output and its log.
func (s *Server) Written() ([]byte, error) {
	names, err := filepath.Glob(s.path("log") + "/*")
	if err != nil {
		return nil, err
	}
	var all []byte
	for _, name := range append(names, s.path("output")) {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		all = append(all, data...)
	}
	return all, nil
}
