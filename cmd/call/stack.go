package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// loopback is the address on which everything listens. The links with localhost lead there, too.
	loopback = "127.0.0.1"
	// servicePath is where the homeserver serves the requests for tokens, and sfuPath is where LiveKit is, both below our own address.
	servicePath, sfuPath = "/_matrix/client/livekit", "/livekit"

	startTimeout = time.Minute
	pollInterval = 50 * time.Millisecond
)

// stack is what runs.
type stack struct {
	dir   string
	parts parts
	watch *watch

	listener   net.Listener
	web        *http.Server
	homeserver *homeserver.Server
	sfu        *program
}

// url returns our own address, with one of the names of this machine.
func (s *stack) url(host string) string {
	return fmt.Sprintf("http://%s:%d", host, s.listener.Addr().(*net.TCPAddr).Port)
}

// start starts everything, and makes a room for a call.
func (s *stack) start(ctx context.Context, port int) (err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if s.listener, err = net.Listen("tcp", net.JoinHostPort(loopback, strconv.Itoa(port))); err != nil {
		return err
	}
	f := &front{watch: s.watch, hsToken: rand.Text()}
	if f.pages, err = openPages(s.parts.pages); err != nil {
		return err
	}
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	cfg := livekit.Config{APIURL: fmt.Sprintf("http://%s:%d", loopback, ports[0]), Key: "call", Secret: livekit.Secret(rand.Text() + rand.Text())}
	asToken := rand.Text()
	if err = s.makeHomeserver(cfg, asToken, f.hsToken); err != nil {
		return err
	}
	if err = s.startLiveKit(ctx, cfg, ports); err != nil {
		return err
	}
	if err = s.homeserver.Start(ctx); err != nil {
		return err
	}
	if f.room, err = makeRoom(ctx, &homeserver.Client{URL: s.homeserver.URL, Token: asToken}); err != nil {
		return err
	}
	handler, err := f.handler(s.homeserver.URL, cfg.APIURL)
	if err != nil {
		return err
	}
	s.web = &http.Server{Handler: handler, ReadHeaderTimeout: startTimeout}
	go func() { _ = s.web.Serve(s.listener) }()
	return nil
}

// stop ends all that start has started.
func (s *stack) stop() {
	if s.web != nil {
		_ = s.web.Close()
	} else if s.listener != nil {
		_ = s.listener.Close()
	}
	if s.sfu != nil {
		s.sfu.kill()
	}
	if s.homeserver != nil {
		s.homeserver.Kill()
	}
}

// makeHomeserver configures the homeserver. We are an application service of it: so it tells us of all events of all rooms, and we need no
// account that would be in the call.
func (s *stack) makeHomeserver(sfu livekit.Config, asToken, hsToken string) error {
	dir := filepath.Join(s.dir, "homeserver")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	service := filepath.Join(dir, "call.yaml")
	registration := fmt.Appendf(nil, `{id: call, url: %q, as_token: %s, hs_token: %s, sender_localpart: call,
namespaces: {rooms: [{exclusive: false, regex: ".*"}]}}`, s.url(loopback), asToken, hsToken)
	if err := os.WriteFile(service, registration, 0o600); err != nil {
		return err
	}
	var err error
	s.homeserver, err = homeserver.New(s.parts.homeserver, dir, homeserver.Config{
		LogLevel: "info", AppServices: []string{service},
		MatrixRTC: map[string]any{"livekit": map[string]any{
			"url": fmt.Sprintf("ws://localhost:%d%s", s.listener.Addr().(*net.TCPAddr).Port, sfuPath), "api_url": sfu.APIURL,
			"api_key": sfu.Key, "api_secret": string(sfu.Secret),
			"service_path": servicePath, "service_url": s.url("localhost") + servicePath,
		}},
	})
	return err
}

// startLiveKit starts LiveKit, as docs/element-call.md configures it but on loopback alone, and returns when it answers.
func (s *stack) startLiveKit(ctx context.Context, cfg livekit.Config, ports []int) error {
	config := filepath.Join(s.dir, "livekit.yaml")
	text := fmt.Sprintf(`port: %d
bind_addresses: [%s]
rtc: {udp_port: %d, tcp_port: %d, node_ip: %[2]s, enable_loopback_candidate: true, interfaces: {includes: [lo, lo0]}}
keys: {%[5]s: %[6]s}
webhook: {api_key: %[5]s, urls: [%[7]q]}
`, ports[0], loopback, ports[1], ports[2], cfg.Key, string(cfg.Secret), s.homeserver.URL+servicePath+"/sfu_webhook")
	err := os.WriteFile(config, []byte(text), 0o600)
	if err != nil {
		return err
	}
	if s.sfu, err = startProgram("LiveKit", filepath.Join(s.dir, "livekit.log"), s.parts.livekit, "--config", config); err != nil {
		return err
	}
	for client := livekit.New(cfg); ; {
		if _, err = client.Check(ctx); err == nil {
			return nil
		}
		select {
		case <-s.sfu.ended:
			return s.sfu.failure()
		case <-ctx.Done():
			return fmt.Errorf("LiveKit does not answer: %w", err)
		case <-time.After(pollInterval):
		}
	}
}

// makeRoom makes a room as Element Call makes one, and returns its ID.
func makeRoom(ctx context.Context, service *homeserver.Client) (string, error) {
	type m = map[string]any
	answer, err := service.Do(ctx, http.MethodPost, "/_matrix/client/v3/createRoom", m{
		"name": "Call", "preset": "public_chat", "visibility": "private",
		"power_level_content_override": m{"events": m{memberType: 0}},
	})
	if err != nil {
		return "", err
	}
	roomID := answer.Get("room_id").Str
	if roomID == "" {
		return "", fmt.Errorf("making a room: %s", answer)
	}
	return roomID, nil
}

// program is a program that runs.
type program struct {
	name, log string
	cmd       *exec.Cmd
	ended     chan struct{} // closed when it has ended
}

func startProgram(name, log, path string, args ...string) (*program, error) {
	output, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	p := &program{name: name, log: log, cmd: exec.Command(path, args...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = output, output
	if err = p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// failure returns an error with the last lines of the log of a program that has ended.
func (p *program) failure() error {
	log, err := os.ReadFile(p.log)
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	return errors.Join(fmt.Errorf("%s has ended:\n%s", p.name, bytes.Join(lines[max(0, len(lines)-10):], []byte("\n"))), err)
}

func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// freePorts returns ports of loopback that are free at the moment, for TCP and for UDP.
func freePorts(n int) (ports []int, err error) {
	for len(ports) < n {
		tcp, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
		if err != nil {
			return nil, err
		}
		defer tcp.Close() // at the end, so that no port comes twice
		if udp, err := net.ListenPacket("udp", tcp.Addr().String()); err == nil {
			_ = udp.Close()
			ports = append(ports, tcp.Addr().(*net.TCPAddr).Port)
		}
	}
	return ports, nil
}
