package homeserver

import (
	"errors"
	"io"
	"net"
	"sync"
)

// Gate is a proxy in front of the address at which other servers find a server. It can hold what they send, as a slow network
// does: a test decides so when an event of another server arrives. It forwards bytes, and TLS passes through it.
type Gate struct {
	listener net.Listener
	target   string // set before anything is forwarded

	mu    sync.Mutex
	open  *sync.Cond // broadcast when held or closed changes
	held  bool
	ended bool
}

// NewGate listens on an address of loopback. It must be closed.
func NewGate(host string) (*Gate, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	g := &Gate{listener: l}
	g.open = sync.NewCond(&g.mu)
	return g, nil
}

// Hold keeps everything that comes from now on, until Release.
func (g *Gate) Hold() { g.set(true) }

// Release lets through what was held, in the order of each connection.
func (g *Gate) Release() { g.set(false) }

func (g *Gate) set(held bool) {
	g.mu.Lock()
	g.held = held
	g.mu.Unlock()
	g.open.Broadcast()
}

// Close ends the gate and its connections.
func (g *Gate) Close() error {
	g.mu.Lock()
	g.ended = true
	g.mu.Unlock()
	g.open.Broadcast()
	return g.listener.Close()
}

// forward serves connections to target until Close.
func (g *Gate) forward(target string) {
	g.target = target
	go func() {
		for {
			conn, err := g.listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go g.serve(conn)
			}
		}
	}()
}

func (g *Gate) serve(from net.Conn) {
	defer from.Close()
	to, err := net.Dial("tcp", g.target)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(from, to)
		_ = from.Close()
	}()
	_, _ = io.Copy(heldWriter{g, to}, from)
}

// heldWriter writes while the gate is open.
type heldWriter struct {
	g  *Gate
	to io.Writer
}

func (w heldWriter) Write(data []byte) (int, error) {
	w.g.mu.Lock()
	for w.g.held && !w.g.ended {
		w.g.open.Wait()
	}
	ended := w.g.ended
	w.g.mu.Unlock()
	if ended {
		return 0, net.ErrClosed
	}
	return w.to.Write(data)
}
