// g++ -O3 -std=c++20 -ffp-contract=off -I csrc benchmarks/trellis_search.cpp csrc/cpu/viterbi*.cpp -o /tmp/trellis_search
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#include "codecs/trellis.h"
#include "cpu/viterbi.h"
using namespace rs;
template <int K> double mse(const std::vector<float>& x, const std::vector<uint8_t>& codes, const PolarTable& table){
  double xq=0,qq=0,xx=0; size_t n=x.size()/256;
  for(size_t i=0;i<n;i++) for(int t=0;t<128;t++){ float w[2]; table.point(Trellis<K>::state(&codes[i*16*K],t),w); const float*y=&x[i*256+2*t]; for(int c=0;c<2;c++){ xq+=y[c]*w[c]; qq+=w[c]*w[c]; xx+=y[c]*y[c]; } }
  return 1-xq*xq/qq/xx; }
int main(int argc,char**argv){
  int n=argc>1?atoi(argv[1]):1024; int kk=argc>2?atoi(argv[2]):0; const char* dump=argc>3?argv[3]:nullptr; (void)dump;
  std::mt19937_64 rng(1); std::normal_distribution<float> g; std::vector<float> x(size_t(n)*256); for(float&v:x) v=g(rng);
  for(int k=3;k<=8;k++){ if(kk&&k!=kk) continue;
    float radius[64],angle[16]; for(int i=0;i<64;i++) radius[i]=std::sqrt(-2*std::log(1-(i+.5)/64)); for(int j=0;j<16;j++) angle[j]=(j+.5)*M_PI/32;
    double s2=0; { PolarTable t(radius,angle); for(uint32_t s=0;s<65536;s++){ float w[2]; t.point(s,w); s2+=w[0]*w[0]+w[1]*w[1]; } }
    double sc=(k<7?1.0:1.06)/std::sqrt(s2/131072); for(float&r:radius) r*=sc;
    PolarTable table(radius,angle); TrellisSearch search(k,radius,angle,Search::exact,Isa::avx512);
    std::vector<uint8_t> codes(size_t(n)*16*k); double best=1e9;
    for(int r=0;r<3;r++){ auto s=std::chrono::steady_clock::now(); search.run(x.data(),n,codes.data()); double d=std::chrono::duration<double>(std::chrono::steady_clock::now()-s).count(); best=std::min(best,d);}    
    double e= k==3?mse<3>(x,codes,table):k==4?mse<4>(x,codes,table):k==5?mse<5>(x,codes,table):k==6?mse<6>(x,codes,table):k==7?mse<7>(x,codes,table):mse<8>(x,codes,table);
    printf("k=%d mse %.5f  %.3f Mw/s\n",k,e,n*256/best/1e6);
  }
}
