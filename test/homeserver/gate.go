package homeserver

import (
	"errors"
	"io"
	"net"
	"sync"
)

// Gate is a proxy in front of a server, for the requests of other servers. It can hold these requests, like a slow network, so that a test
// decides when another server's event arrives. It forwards bytes, and does not end TLS.
type Gate struct {
	listener net.Listener
	target   string // set before the first connection is forwarded

	mu    sync.Mutex
	open  *sync.Cond // broadcast when held or closed changes
	held  bool
	ended bool
}

// NewGate listens on a loopback address. The caller must close the gate.
func NewGate(host string) (*Gate, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	g := &Gate{listener: l}
	g.open = sync.NewCond(&g.mu)
	return g, nil
}

// Hold holds everything that arrives from now on, until Release.
func (g *Gate) Hold() { g.set(true) }

// Release forwards the held bytes, in the order of each connection.
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

// heldWriter writes while the gate is open. While the gate holds, a write waits.
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
