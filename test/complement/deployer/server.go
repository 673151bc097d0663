package deployer

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/config"
)

const (
	clientPort     = "8008"
	federationPort = "8448"
	pollInterval   = 20 * time.Millisecond
)

// server is one homeserver, running or not.
type server struct {
	binary, dir, host string
	// patience limits how long the server may take to start, and to stop.
	patience time.Duration
	cmd      *exec.Cmd // nil if it does not run
	exited   chan struct{}
}

func newServer(cfg *config.Complement, dir string, hs b.Homeserver) (*server, error) {
	host, err := address(hs.Name)
	if err != nil {
		return nil, err
	}
	if err = os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	binary := cmp.Or(cfg.BaseImageURIs[strings.ToUpper(hs.Name)], cfg.BaseImageURI)
	return &server{binary: binary, dir: dir, host: host, patience: cfg.SpawnHSTimeout}, configure(cfg, dir, hs)
}

// clientURL is the server's URL for clients.
func (s *server) clientURL() string { return "http://" + net.JoinHostPort(s.host, clientPort) }

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

// log is the file with the server's output.
func (s *server) log() string { return s.path("log") }

// start starts the server and returns when it answers.
func (s *server) start() error {
	if s.cmd != nil {
		return errors.New("it runs already")
	}
	log, err := os.OpenFile(s.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.binary, "--really-enable-open-registration", "--config", s.path(configFile),
		"--http-bind-address", net.JoinHostPort(s.host, clientPort),
		"--https-bind-address", net.JoinHostPort(s.host, federationPort),
		"--tls-cert", s.path(certFile), "--tls-key", s.path(keyFile))
	// There is no folder of this name, so the server trusts only Complement's authority.
	cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+s.path(authorityFile), "SSL_CERT_DIR="+s.path("nothing"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	if err = cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	s.cmd, s.exited = cmd, exited
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	for late := time.After(s.patience); ; {
		if res, err := http.Get(s.clientURL() + "/_matrix/client/versions"); err == nil {
			_ = res.Body.Close()
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("%s, see %s", cmd.ProcessState, s.log())
		case <-late:
			return fmt.Errorf("no answer after %s, see %s", s.patience, s.log())
		case <-time.After(pollInterval):
		}
	}
}

// stop ends the server as an operator does. If that takes too long, it kills the server.
func (s *server) stop() error {
	if err := s.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-s.exited:
	case <-time.After(s.patience):
	}
	s.kill()
	return nil
}

// kill ends the server as a crash does, if it runs.
func (s *server) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		<-s.exited
		s.cmd = nil
	}
}

func (s *server) signal(signal syscall.Signal) error {
	if s.cmd == nil {
		return errors.New("it does not run")
	}
	return s.cmd.Process.Signal(signal)
}

// pause suspends the process, which keeps its memory.
func (s *server) pause() error { return s.signal(syscall.SIGSTOP) }

// unpause resumes the process.
func (s *server) unpause() error { return s.signal(syscall.SIGCONT) }
