// Package around helps routes that change an answer of Dendrite's. Such a route is registered before Dendrite's route of the same path. It
// calls Dendrite's route and changes its answer.
package around

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/util"
)

// asked is the key that marks the context of a request that is passed on to Dendrite.
type asked struct{}

// First is a matcher for all requests except those that are passed on to Dendrite. Each route that calls Dendrite must have it, or it would
// call itself.
func First(req *http.Request, _ *mux.RouteMatch) bool {
	return req.Context().Value(asked{}) == nil
}

// Dendrite returns the answer of Dendrite's route. ok is false if its status is not 200. Then the caller should return the answer
// unchanged.
func Dendrite(router http.Handler, req *http.Request) (answer util.JSONResponse, body []byte, ok bool) {
	kept := buffer{header: http.Header{}, code: http.StatusOK}
	router.ServeHTTP(&kept, req.WithContext(context.WithValue(req.Context(), asked{}, true)))
	body = kept.body.Bytes()
	return util.JSONResponse{Code: kept.code, JSON: json.RawMessage(body)}, body, kept.code == http.StatusOK
}

// buffer is a ResponseWriter that keeps the answer in memory.
type buffer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (b *buffer) Header() http.Header         { return b.header }
func (b *buffer) WriteHeader(code int)        { b.code = code }
func (b *buffer) Write(p []byte) (int, error) { return b.body.Write(p) }
